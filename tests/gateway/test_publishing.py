"""Publishing with ModelScope tokens: through a process of its own, against a stand-in of the site."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.world import API, Tenant, World, world
from tests.hub.site import MARKER, Site, running_site
from twinkle_serve.config import ModelScopeConfig
from twinkle_serve.gateway import publishing
from twinkle_serve.gateway.publishing import _MAX_NAME, Publisher, repository_name
from twinkle_serve.hub.push import Order
from twinkle_serve.protocol.errors import Busy
from twinkle_serve.storage.checkpoints import write_checkpoint

TOKEN, OTHER = "ms-canary-0123456789", "ms-other-0123456789"
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 40}


@pytest.fixture
def site() -> Iterator[Site]:
    with running_site({TOKEN: "alice", OTHER: "bob"}, members=("alice", "bob")) as site:
        yield site


def auth(site: Site, **fields: Any) -> dict[str, Any]:
    return {"mode": "modelscope", "modelscope": {"endpoint": site.url, "marker_repo": MARKER, **fields}}


async def owner_with_adapter(here: World) -> tuple[Tenant, str]:
    """A tenant whose checkpoint has the files of a real one, and its URL."""
    owner = await here.tenant(f"tml-{TOKEN}").settle()
    base = f"training_runs/{owner.objects['run']}/checkpoints/weights/a"
    record = here.plane._books.checkpoints.at((owner.objects["run"], "weights", "a"))
    assert record is not None
    content = {**FILES, "optimizer.safetensors": b"moments"}
    write_checkpoint(record.directory, content, {})
    return owner, f"{API}/{base}"


async def test_a_published_adapter_is_in_a_private_repository_of_its_owner(
    tmp_path: Path, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with world(tmp_path, auth=auth(site)) as here:
        owner, base = await owner_with_adapter(here)
        homes = {path: path.stat().st_mtime_ns for path in Path.home().glob(".modelscope*/**/*")}
        answer = await owner.request("POST", f"{base}/publish")
        assert answer.status_code == 204, answer.text
        (name,) = site.repositories
        assert name.startswith("alice/session-")
        assert site.repositories[name] == FILES, "the adapter, and not the optimizer's state"
        assert site.visibility[name] == 1, "private"
        assert {token for path, token in site.seen if "repos" in path} == {TOKEN}
        # Asked again, by this replica or another: nothing to do.
        assert (await owner.request("POST", f"{base}/publish")).status_code == 204
        assert site.commits == 1
        assert {path: path.stat().st_mtime_ns for path in Path.home().glob(".modelscope*/**/*")} == homes
        stored = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        assert stored
        assert not any(TOKEN.encode() in content for content in stored)
        assert TOKEN not in Path(f"/proc/{os.getpid()}/environ").read_text(errors="replace")
        assert TOKEN not in caplog.text


async def test_what_its_owner_deleted_at_the_site_is_pushed_again(tmp_path: Path, site: Site) -> None:
    async with world(tmp_path, auth=auth(site)) as here:
        owner, base = await owner_with_adapter(here)
        for commits in (1, 2):
            site.repositories.clear()
            for _ in range(2):
                assert (await owner.request("POST", f"{base}/publish")).status_code == 204
            assert list(site.repositories.values()) == [FILES]
            assert site.commits == commits


async def test_only_the_owner_publishes_and_nothing_is_pushed_for_others(tmp_path: Path, site: Site) -> None:
    async with world(tmp_path, auth=auth(site)) as here:
        _, base = await owner_with_adapter(here)
        stranger = here.tenant(f"tml-{OTHER}")
        assert (await stranger.request("POST", f"{base}/publish")).status_code == 404
        assert site.repositories == {}


async def assert_unpublished(owner: Tenant, answer: httpx.Response, caplog: pytest.LogCaptureFixture) -> None:
    """And nobody was told the token."""
    assert TOKEN not in answer.text
    assert TOKEN not in caplog.text
    listed = (await owner.request("GET", f"{API}/checkpoints")).json()["checkpoints"]
    assert listed
    assert not any(item["public"] for item in listed)


async def test_a_refused_push_publishes_nothing_and_says_why(
    tmp_path: Path, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with world(tmp_path, auth=auth(site)) as here:
        owner, base = await owner_with_adapter(here)
        site.refusal = f"alice with {TOKEN} has too many models"
        answer = await owner.request("POST", f"{base}/publish")
        assert answer.status_code == 400
        assert "ModelScope refused the push: " in answer.json()["detail"]
        assert "alice with *** has too many models" in answer.json()["detail"]
        await assert_unpublished(owner, answer, caplog)
        site.refusal = ""
        assert (await owner.request("POST", f"{base}/publish")).status_code == 204, "asked again"


async def test_while_the_site_is_down_nothing_is_published(
    tmp_path: Path, site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    # The client's pauses between its attempts are its own matter.
    attempts = "MODELSCOPE_API_MAX_RETRIES"
    monkeypatch.setenv(attempts, "1")
    monkeypatch.setattr(publishing, "_KEPT_ENVIRONMENT", (*publishing._KEPT_ENVIRONMENT, attempts))
    async with world(tmp_path, auth=auth(site)) as here:
        owner, base = await owner_with_adapter(here)
        site.broken = True
        answer = await owner.request("POST", f"{base}/publish")
        assert answer.status_code == 503
        assert "ModelScope does not answer" in answer.json()["detail"]
        await assert_unpublished(owner, answer, caplog)


async def test_a_client_that_cannot_wait_comes_again(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twinkle_serve.gateway.publishing._WAIT_S", 0.0)
    async with world(tmp_path, auth=auth(site)) as here:
        owner, base = await owner_with_adapter(here)
        statuses = [(await owner.request("POST", f"{base}/publish")).status_code]
        assert statuses == [429]
        monkeypatch.setattr("twinkle_serve.gateway.publishing._WAIT_S", 60.0)
        answers = await asyncio.gather(*(owner.request("POST", f"{base}/publish") for _ in range(3)))
        assert [answer.status_code for answer in answers] == [204] * 3
        assert site.commits == 1


async def test_few_are_pushed_at_a_time_and_the_others_stand_in_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: set[str] = set()
    ended, most, over = [], 0, asyncio.Event()

    async def run(order: Order) -> str:
        nonlocal most
        running.add(order.name)
        most = max(most, len(running))
        await over.wait()
        running.remove(order.name)
        ended.append(order.name)
        return order.name

    monkeypatch.setattr(publishing, "_run", run)
    publisher = Publisher(ModelScopeConfig(), tmp_path)
    files = {name: str(tmp_path / name) for name in FILES}
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    paths = [f"tinker://s:train:0/weights/{number}" for number in range(20)]
    monkeypatch.setattr(publishing, "_WAIT_S", 0.01)
    asked = [publisher.push("t", f"tml-{TOKEN}", path, files) for path in paths]
    assert {type(answer) for answer in await asyncio.gather(*asked, return_exceptions=True)} == {Busy}
    assert len(running) == 4
    monkeypatch.setattr(publishing, "_WAIT_S", 60.0)
    over.set()
    await asyncio.gather(*(publisher.push("t", f"tml-{TOKEN}", path, files) for path in paths))
    assert sorted(ended) == sorted(map(repository_name, paths))
    assert most == 4


async def test_what_has_no_adapter_in_the_clear_is_refused(tmp_path: Path, site: Site) -> None:
    async with world(tmp_path, auth=auth(site)) as here:
        owner = await here.tenant(f"tml-{TOKEN}").settle()
        record = here.plane._books.checkpoints.at((owner.objects["run"], "external_weights", "a"))
        assert record is not None
        write_checkpoint(record.directory, {f"{name}.age": b"secret" for name in FILES}, {})
        base = f"{API}/training_runs/{owner.objects['run']}/checkpoints/external_weights/a"
        answer = await owner.request("POST", f"{base}/publish")
        assert answer.status_code == 400
        assert "which an encrypted export has not" in answer.json()["detail"]
        assert site.repositories == {}
        info = await owner.request("GET", f"{API}/checkpoints")
        assert not any(item["public"] for item in info.json()["checkpoints"])


async def test_it_can_be_switched_off(tmp_path: Path, site: Site) -> None:
    async with world(tmp_path, auth=auth(site, push_published=False)) as here:
        owner, base = await owner_with_adapter(here)
        assert (await owner.request("POST", f"{base}/publish")).status_code == 204
        assert site.repositories == {}


def test_names_of_repositories_differ_where_paths_do() -> None:
    assert repository_name("tinker://s:train:0/weights/a") == "s-train-0-weights-a"
    long = [repository_name(f"tinker://s:train:0/weights/{'x' * 120}{n}") for n in range(2)]
    assert long[0] != long[1]
    assert max(map(len, long)) <= _MAX_NAME
