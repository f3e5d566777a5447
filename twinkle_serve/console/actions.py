"""What can be done here: sign in and out, change checkpoints, fetch one, chat.

Knows forms. Whether it may be done is the control plane's to say, as for the SDK.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from starlette.responses import RedirectResponse, Response

from twinkle_serve.console.render import HEADERS, page
from twinkle_serve.console.sign_in import MAX_KEY_CHARS, Seal
from twinkle_serve.console.visitors import Form, SignedIn, check_origin
from twinkle_serve.gateway.checkpoints import publish_as
from twinkle_serve.gateway.context import gateway_of
from twinkle_serve.gateway.links import resource_path
from twinkle_serve.gateway.openai import completions
from twinkle_serve.protocol.errors import Unauthorized, UserError
from twinkle_serve.protocol.paths import parse_path

router = APIRouter()
_DAY = 86_400
LIFETIMES: dict[str, int | None] = {"day": _DAY, "week": 7 * _DAY, "month": 30 * _DAY, "ever": None}
Next = Annotated[str, Query(max_length=2000)]


@router.get("/sign-in")
async def sign_in_page(request: Request, next: Next = "") -> Response:
    return page(request, "sign_in.html", visitor=None, problem="", next=next)


@router.post("/sign-in")
async def sign_in(request: Request, form: Form) -> Response:
    key, after = form.get("key", "").strip(), form.get("next", "")
    problem = "no_key"
    if 0 < len(key) <= MAX_KEY_CHARS:
        try:
            await gateway_of(request).identity.identify({"x-api-key": key})
        except Unauthorized:
            problem = "wrong_key"
        else:
            response = _to(request, _inside(request, after))
            seal: Seal = request.app.state.seal
            seal.put(response, request, key)
            return response
    return page(request, "sign_in.html", 401, visitor=None, problem=problem, next=after)


@router.post("/sign-out")
async def sign_out(request: Request, form: Form) -> Response:
    response = _to(request, f"{request.scope['root_path']}/sign-in")
    seal: Seal = request.app.state.seal
    seal.remove(response, request)
    return response


@router.post("/checkpoints/publish")
async def publish(request: Request, form: Form, visitor: SignedIn) -> Response:
    """As the SDK's: where ModelScope tokens are keys, publishing also pushes to the owner's repository."""
    call = visitor.call
    if form.get("public") == "yes":
        await publish_as(call, _path(form), visitor.key)
        return _done(request, "published")
    await call.backend.publish_checkpoint(call.tenant, _path(form), False)
    return _done(request, "unpublished")


@router.post("/checkpoints/delete")
async def delete(request: Request, form: Form, visitor: SignedIn) -> Response:
    await visitor.call.backend.delete_checkpoint(visitor.call.tenant, _path(form))
    return _done(request, "deleted")


@router.post("/checkpoints/keep")
async def keep(request: Request, form: Form, visitor: SignedIn) -> Response:
    if form.get("lifetime") not in LIFETIMES:
        raise UserError(f"lifetime must be one of {', '.join(LIFETIMES)}")
    call = visitor.call
    await call.backend.set_checkpoint_ttl(call.tenant, _path(form), LIFETIMES[form["lifetime"]])
    return _done(request, "kept")


@router.get("/download")
async def download(request: Request, visitor: SignedIn, path: Next) -> Response:
    """A redirect to the signed link of one tar with all files."""
    call, parsed = visitor.call, parse_path(path)
    await call.backend.checkpoint_files(call.tenant, str(parsed))
    resource = resource_path("downloads", parsed.run_id, parsed.kind, parsed.name, "archive.tar")
    query, _ = call.gateway.links.sign(call.tenant, resource)
    prefix = request.scope["root_path"].removesuffix("/console")
    return _to(request, f"{prefix}/api/v1/{resource}?{query}")


@router.post("/chat")
async def chat(request: Request, visitor: SignedIn) -> Response:
    """The same as POST /v1/chat/completions, for who is signed in here."""
    check_origin(request)
    return await completions.chat(request, visitor.call)


def _path(form: dict[str, str]) -> str:
    """Raises UserError."""
    return str(parse_path(form.get("path", "")))


def _done(request: Request, what: str) -> Response:
    return _to(request, f"{request.scope['root_path']}/checkpoints?{urlencode({'done': what})}")


def _inside(request: Request, after: str) -> str:
    """Where to go after signing in: a page of the console, whatever the form said."""
    base = request.scope["root_path"]
    return after if after.startswith(f"{base}/") and "\\" not in after else f"{base}/"


def _to(request: Request, url: str) -> Response:
    return RedirectResponse(url, 303, headers=HEADERS)
