"""What the pages show, in both languages, and what they never do."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from tests.console.conftest import KEY, RUN, checkpoint, insight, sign_in
from tests.gateway.scripted import ScriptedBackend
from twinkle_serve import console
from twinkle_serve.config import Config
from twinkle_serve.console.app import add_console
from twinkle_serve.console.texts import TEXTS
from twinkle_serve.control.backend import NotFound
from twinkle_serve.gateway.app import create_app
from twinkle_serve.protocol.errors import BackendUnavailable

PAGES = [
    "/console/",
    f"/console/runs/{RUN}",
    "/console/checkpoints",
    "/console/playground",
    "/console/cluster",
]


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("url", [*PAGES, "/"])
async def test_each_page_renders_in_each_language(
    browser: httpx.AsyncClient, url: str, language: str
) -> None:
    answer = await browser.get(url, params={"language": language})
    assert answer.status_code == 200
    assert f'<html lang="{language}">' in answer.text
    assert KEY not in answer.text
    has_chinese = re.search(r"[\u4e00-\u9fff]{2}", answer.text.replace("中文", ""))
    assert bool(has_chinese) == (language == "zh")


@pytest.mark.parametrize("url", [*PAGES, "/", "/console/sign-in"])
async def test_nothing_comes_from_elsewhere_or_runs_inline(browser: httpx.AsyncClient, url: str) -> None:
    answer = await browser.get(url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert not re.search(r"<script(?![^>]*src=)", answer.text), "an inline script"
    assert not re.search(r"\s(style|on\w+)=", answer.text), "an inline style or handler"
    for address in re.findall(r'(?:src|href|action)="([^"]*)"', answer.text):
        assert not re.match(r"(?i)https?:|//", address), address


async def test_all_that_a_page_loads_is_there(browser: httpx.AsyncClient) -> None:
    loaded = set()
    for url in PAGES:
        text = (await browser.get(url)).text
        loaded |= set(re.findall(r'(?:src|href)="(/console/static/[^"]*)"', text))
    assert len(loaded) >= 7
    for url in loaded:
        assert (await browser.get(url)).status_code == 200, url


async def test_a_row_shows_a_runs_numbers(browser: httpx.AsyncClient) -> None:
    text = (await browser.get("/console/")).text
    assert RUN in text
    for cell in ("Qwen/Tiny", "idle", ">2.5<", ">20<", "2026-01-02 03:04 UTC"):
        assert cell in text


@pytest.mark.parametrize(
    ("status", "english", "chinese"),
    [
        ({"state": "waiting", "position": 3, "seconds": 39.2}, "waiting: position 3, ~40 s", "约 40 秒"),
        ({"state": "waiting", "position": 2, "seconds": None}, "waiting: position 2", "第 2 位"),
        ({"state": "gap", "missing": 4}, "waiting for request 4", "第 4 号"),
        ({"state": "working"}, "training", "训练中"),
        ({"state": "paged"}, "paged out", "已换出"),
        ({"state": "asleep"}, "asleep", "休眠"),
        ({"state": "unloaded"}, "unloaded", "已卸载"),
        ({"state": "corrupted"}, "damaged", "已损坏"),
        ({"state": "not_served"}, "base model not loaded", "基础模型未加载"),
    ],
)
async def test_states_in_words(
    browser: httpx.AsyncClient, backend: ScriptedBackend, status: dict, english: str, chinese: str
) -> None:
    backend.insight = insight(**status)
    assert english in (await browser.get(f"/console/runs/{RUN}?language=en")).text
    assert chinese in (await browser.get(f"/console/runs/{RUN}?language=zh")).text


async def test_curves_are_sent_once_for_each_version(
    browser: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    url = f"/console/runs/{RUN}/curves"
    first = (await browser.get(url)).json()
    assert first["steps"]["loss"] == [2.5, None]
    assert first["status"] == "idle"
    again = (await browser.get(url, params={"version": first["version"]})).json()
    assert again == {"status": "idle", "state": "idle"}
    assert "steps" in (await browser.get(url, params={"version": 6})).json()


async def test_another_tenants_run_is_not_there(
    stranger: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    await sign_in(stranger, "tml-alice")
    assert (await stranger.get(f"/console/runs/{RUN}")).status_code == 200
    await stranger.post("/console/sign-out")
    await sign_in(stranger, "tml-bob")
    for url in (f"/console/runs/{RUN}", f"/console/runs/{RUN}/curves"):
        answer = await stranger.get(url)
        assert answer.status_code == 404
        assert "2.5" not in answer.text


async def test_paging_leads_on_and_back(browser: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.checkpoints[:] = [checkpoint(f"tinker://{RUN}/weights/c{i}") for i in range(60)]
    text = (await browser.get("/console/checkpoints?offset=25")).text
    assert backend.asked("list_checkpoints")[-1][2:] == (25, 25)
    assert "?offset=0" in text


async def test_what_users_named_cannot_become_markup(
    browser: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    nasty = f"tinker://{RUN}/weights/<script>alert(1)</script>\"'"
    backend.checkpoints[:] = [checkpoint(nasty)]
    text = (await browser.get("/console/checkpoints")).text
    assert "<script>alert" not in text
    assert "&lt;script&gt;" in text


async def test_the_playground_knows_each_checkpoints_base(browser: httpx.AsyncClient) -> None:
    text = (await browser.get("/console/playground")).text
    assert re.search(r'<option value="tinker://[^"]*" data-model="Qwen/Tiny">', text)


async def test_the_cluster_page_is_for_operators(backend: ScriptedBackend) -> None:
    tree = {"models": [{"name": "Qwen/Tiny", "path": "/m"}], "console": {"operators": ["nobody"]}}
    app = create_app(lambda: backend, Config.model_validate(tree))
    add_console(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://s") as client:
        await sign_in(client)
        assert (await client.get("/console/cluster")).status_code == 403
        assert "/console/cluster" not in (await client.get("/console/")).text
    assert not backend.asked("cluster_view")


async def test_the_cluster_page_shows_slots_shares_and_recoveries(browser: httpx.AsyncClient) -> None:
    text = (await browser.get("/console/cluster?language=en")).text
    for part in ("abcd1234", "100 %", "2026-01-02 03:04 UTC", "2.5 MB", "0.25 s"):
        assert part in text
    assert text.count("<li>free</li>") == 2
    assert "surprise" not in text


async def test_a_missing_thing_is_a_page(browser: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.error = NotFound("secret detail")
    answer = await browser.get(f"/console/runs/{RUN}")
    assert answer.status_code == 404
    assert "secret detail" not in answer.text
    assert (await browser.get("/console/nowhere")).status_code == 404


async def test_while_the_service_is_away_the_page_tries_again(
    browser: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    backend.error = BackendUnavailable("loading base model")
    answer = await browser.get("/console/")
    assert answer.status_code == 503
    assert 'http-equiv="refresh"' in answer.text
    landing = await browser.get("/")
    assert landing.status_code == 200
    assert "Qwen/Tiny" in landing.text


async def test_the_landing_page_says_how_to_connect(stranger: httpx.AsyncClient) -> None:
    text = (await stranger.get("/")).text
    assert 'base_url="http://server"' in text
    assert "http://server/v1" in text
    assert "Qwen/Tiny" in text


async def test_the_console_can_be_switched_off(backend: ScriptedBackend) -> None:
    tree = {"models": [{"name": "Qwen/Tiny", "path": "/m"}], "console": {"enabled": False}}
    app = create_app(lambda: backend, Config.model_validate(tree))
    add_console(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://s") as client:
        assert (await client.get("/console/")).status_code == 404
        assert '/console/"' not in (await client.get("/")).text


async def test_the_choice_of_a_language_lasts(browser: httpx.AsyncClient) -> None:
    await browser.get("/console/?language=zh")
    assert '<html lang="zh">' in (await browser.get("/console/")).text
    await browser.get("/console/?language=xx")
    assert '<html lang="zh">' in (await browser.get("/console/")).text


def test_every_word_has_a_use() -> None:
    folder = Path(console.__file__).parent
    files = [
        file for file in folder.rglob("*") if file.suffix in (".html", ".py") and file.name != "texts.py"
    ]
    source = "".join(file.read_text() for file in files)
    composed = ("state_", "kind_", "done_", "measure_", "curve_")
    plain = [key for key in TEXTS if not key.startswith(composed)]
    assert [key for key in plain if f'"{key}"' not in source and f"'{key}'" not in source] == []
