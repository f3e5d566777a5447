from __future__ import annotations

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from twinkle_serve.cluster import proxy_hook


async def serves_404(_: Request) -> Response:
    return PlainTextResponse("Path '/x' not found. Ping http://.../-/routes for available routes.", 404)


async def our_404(_: Request) -> Response:
    return JSONResponse({"detail": "no such run"}, 404)


async def page_404(_: Request) -> Response:
    return HTMLResponse("no such page", 404)


async def fine(_: Request) -> Response:
    return PlainTextResponse("fine")


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/serve", 503, "try again"),
        ("/ours", 404, "no such run"),
        ("/page", 404, "no such page"),
        ("/fine", 200, "fine"),
    ],
)
async def test_only_serves_own_not_found_becomes_try_again(monkeypatch, path, status, text):
    monkeypatch.setattr(proxy_hook, "_WAIT_S", 0.0)
    routes = [
        Route("/serve", serves_404),
        Route("/ours", our_404),
        Route("/page", page_404),
        Route("/fine", fine),
    ]
    app = Starlette(routes=routes, middleware=proxy_hook.middlewares())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        answer = await client.get(path)
    assert answer.status_code == status
    assert text in answer.text


def test_serve_finds_it_by_its_path():
    module, _, name = proxy_hook.IMPORT_PATH.partition(":")
    assert module == proxy_hook.__name__
    assert getattr(proxy_hook, name) is proxy_hook.middlewares
