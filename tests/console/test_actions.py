"""Forms: each does what it says through the backend, as the signed-in tenant."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.console.conftest import KEY, PATH, RUN, sign_in
from tests.gateway.scripted import ScriptedBackend
from twinkle_serve.config import Config
from twinkle_serve.console.app import add_console
from twinkle_serve.control.backend import NotFound
from twinkle_serve.gateway.app import create_app
from twinkle_serve.storage.checkpoints import MANIFEST, write_checkpoint


@pytest.mark.parametrize(
    ("value", "public", "done"), [("yes", True, "published"), ("no", False, "unpublished")]
)
async def test_publishing(
    browser: httpx.AsyncClient, backend: ScriptedBackend, value: str, public: bool, done: str
) -> None:
    answer = await browser.post("/console/checkpoints/publish", data={"path": PATH, "public": value})
    assert (answer.status_code, answer.headers["location"]) == (303, f"/console/checkpoints?done={done}")
    assert backend.asked("publish_checkpoint")[0][1:] == (PATH, public)
    assert 'role="status"' in (await browser.get(answer.headers["location"])).text


class Pusher:
    """Stands for gateway.publishing.Publisher, which needs a hub."""

    def __init__(self) -> None:
        self.pushed: list[tuple[str, str, dict[str, str]]] = []

    async def push(self, tenant: str, key: str, path: str, files: dict[str, str]) -> str:
        self.pushed.append((key, path, dict(files)))
        return "ann/repository"


async def test_publishing_pushes_with_the_visitors_own_token(
    config: Config, backend: ScriptedBackend
) -> None:
    app = create_app(lambda: backend, config)
    pusher = app.state.gateway.publisher = Pusher()
    add_console(app)
    backend.files["adapter_config.json"] = "/x"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://s") as client:
        await sign_in(client)
        assert "push to ModelScope" in (await client.get("/console/checkpoints?language=en")).text
        await client.post("/console/checkpoints/publish", data={"path": PATH, "public": "yes"})
        await client.post("/console/checkpoints/publish", data={"path": PATH, "public": "no"})
    assert pusher.pushed == [(KEY, PATH, {"adapter_config.json": "/x"})]
    assert [public for *_, public in backend.asked("publish_checkpoint")] == [True, False]


async def test_deleting(browser: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    await browser.post("/console/checkpoints/delete", data={"path": PATH})
    assert backend.asked("delete_checkpoint")[0][1:] == (PATH,)


@pytest.mark.parametrize(("lifetime", "seconds"), [("day", 86_400), ("month", 2_592_000), ("ever", None)])
async def test_lifetimes(
    browser: httpx.AsyncClient, backend: ScriptedBackend, lifetime: str, seconds: int | None
) -> None:
    await browser.post("/console/checkpoints/keep", data={"path": PATH, "lifetime": lifetime})
    assert backend.asked("set_checkpoint_ttl")[0][1:] == (PATH, seconds)


@pytest.mark.parametrize("form", [{"path": PATH}, {"path": PATH, "lifetime": "7"}])
async def test_a_lifetime_that_is_not_offered(browser: httpx.AsyncClient, form: dict[str, str]) -> None:
    answer = await browser.post("/console/checkpoints/keep", data=form)
    assert answer.status_code == 400
    assert "lifetime" in answer.text


@pytest.mark.parametrize(
    "path", ["", "nonsense", "tinker://x", "/etc/passwd", f"tinker://{RUN}/weights/../x"]
)
@pytest.mark.parametrize("action", ["publish", "delete"])
async def test_a_path_that_is_none(
    browser: httpx.AsyncClient, backend: ScriptedBackend, action: str, path: str
) -> None:
    answer = await browser.post(f"/console/checkpoints/{action}", data={"path": path})
    assert answer.status_code == 400
    assert not backend.asked("publish_checkpoint")
    assert not backend.asked("delete_checkpoint")


async def test_what_is_not_ours_is_not_there(browser: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.error = NotFound("it belongs to somebody")
    answer = await browser.post("/console/checkpoints/delete", data={"path": PATH})
    assert answer.status_code == 404
    assert "somebody" not in answer.text


@pytest.mark.parametrize("body", [b"\xff\xfe", b"a=1;b", b"&" * 100 + b"x=1", b"x" * 70_000])
async def test_a_malformed_form(browser: httpx.AsyncClient, body: bytes) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = await browser.post("/console/checkpoints/delete", content=body, headers=headers)
    assert answer.status_code in (400, 413)


async def test_a_download_leads_to_a_signed_link(
    browser: httpx.AsyncClient, backend: ScriptedBackend, tmp_path: Path
) -> None:
    name = "adapter_model.safetensors"
    write_checkpoint(tmp_path / "saved", {name: b"weights"}, {})
    backend.files.update({each: str(tmp_path / "saved" / each) for each in (name, MANIFEST)})
    answer = await browser.get("/console/download", params={"path": PATH})
    assert answer.status_code == 303
    link = answer.headers["location"]
    assert link.startswith("/api/v1/downloads/")
    browser.cookies.clear()  # the link is enough
    tar = await browser.get(link)
    assert b"weights" in tar.content
    assert name.encode() in tar.content


async def test_the_playground_asks_like_any_openai_client(
    browser: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    body = {"model": "no such model", "messages": [{"role": "user", "content": "hi"}]}
    answer = await browser.post("/console/chat", json=body)
    assert answer.status_code == 404
    assert "detail" in answer.json()
    answer = await browser.post("/console/chat", json={"model": "Qwen/Tiny", "messages": []})
    assert answer.status_code == 400
