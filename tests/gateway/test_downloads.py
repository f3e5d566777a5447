from __future__ import annotations

import gc
import io
import os
import shutil
import tarfile
import urllib.parse
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from tinker.types import ExternalWeightsUrlsResponse

from tests.gateway.scripted import ScriptedBackend
from twinkle_serve.config import Config
from twinkle_serve.gateway import downloads
from twinkle_serve.gateway.app import create_app
from twinkle_serve.gateway.links import LIFETIME_S, Links
from twinkle_serve.protocol.errors import Unauthorized
from twinkle_serve.storage.checkpoints import MANIFEST, write_checkpoint

BASE = "/training_runs/session-1:train:0/checkpoints/external_weights/ck1"
CONTENTS = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 5}


@pytest.fixture
def files(backend: ScriptedBackend, tmp_path: Path) -> dict[str, bytes]:
    write_checkpoint(tmp_path / "ck1", dict(CONTENTS), {"user_metadata": {"note": "mine"}})
    backend.files.update({name: str(tmp_path / "ck1" / name) for name in (*CONTENTS, MANIFEST)})
    return CONTENTS


async def test_each_file_has_a_link_that_needs_no_key(
    client: httpx.AsyncClient, backend: ScriptedBackend, files: dict[str, bytes]
) -> None:
    answer = ExternalWeightsUrlsResponse.model_validate(
        (await client.get(f"{BASE}/external_weights_urls")).json()
    )
    assert answer.expires > datetime.now(UTC) + timedelta(minutes=5)
    assert set(answer.urls) == set(files)
    for name, url in answer.urls.items():
        found = await client.get(url, headers={"X-API-Key": ""})
        assert found.status_code == 200
        assert found.content == files[name]
        assert int(found.headers["content-length"]) == len(files[name])
    assert backend.asked("checkpoint_files")[-1][1] == "tinker://session-1:train:0/external_weights/ck1"


async def test_a_link_is_for_one_file_of_one_checkpoint(
    client: httpx.AsyncClient, files: dict[str, bytes]
) -> None:
    urls = (await client.get(f"{BASE}/external_weights_urls")).json()["urls"]
    link = urls["adapter_config.json"]
    for spoiled in (
        link.replace("adapter_config.json", "adapter_model.safetensors"),
        link.replace("ck1", "ck2"),
        link.replace("train:0", "train:1"),
        link[:-1] + ("0" if link[-1] != "0" else "1"),
        link.replace("expires=", "expires=9"),
        link.replace("tenant=", "tenant=f"),
        link + "é",
    ):
        answer = await client.get(spoiled)
        assert answer.status_code == 401, spoiled
        assert answer.json()["detail"]
    assert (await client.get(link.split("?")[0])).status_code == 422


async def test_the_archive_is_a_tar_of_plain_files(
    client: httpx.AsyncClient, files: dict[str, bytes]
) -> None:
    redirect = await client.get(f"{BASE}/archive", headers={"Accept": "application/gzip"})
    assert redirect.status_code == 302
    assert redirect.headers["expires"].endswith("GMT")
    found = await client.get(redirect.headers["location"], headers={"X-API-Key": ""})
    assert int(found.headers["content-length"]) == len(found.content)
    with tarfile.open(fileobj=io.BytesIO(found.content)) as tar:
        assert tar.getnames() == [*files, "checkpoint_complete"]
        for name, content in files.items():
            member = tar.extractfile(name)
            assert member is not None
            assert member.read() == content


@pytest.mark.parametrize("event", ["overwritten", "deleted"])
def test_a_tar_is_of_one_save_whatever_happens_while_it_is_read(tmp_path: Path, event: str) -> None:
    def written(content: bytes) -> None:
        write_checkpoint(tmp_path / "x", {"a.bin": content * 3 * 2**20, "b.bin": content}, {})

    written(b"1")
    size, stream = downloads.tar_of(tmp_path / "x")
    parts = [next(stream), next(stream)]
    written(b"2") if event == "overwritten" else shutil.rmtree(tmp_path / "x")
    data = b"".join([*parts, *stream])
    assert len(data) == size
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == ["a.bin", "b.bin", "checkpoint_complete"]
        assert [tar.extractfile(name).read(1) for name in ("a.bin", "b.bin")] == [b"1", b"1"]  # type: ignore[union-attr]


def test_a_tar_that_nobody_reads_leaves_no_file_open(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x", {"a.bin": b"1"}, {})
    before = os.listdir("/proc/self/fd")
    downloads.tar_of(tmp_path / "x")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= len(before)


async def test_a_checkpoint_that_goes_before_its_tar_begins_is_gone(
    client: httpx.AsyncClient, files: dict[str, bytes], tmp_path: Path
) -> None:
    location = (await client.get(f"{BASE}/archive")).headers["location"]
    shutil.rmtree(tmp_path / "ck1")
    assert (await client.get(location)).status_code == 404


async def test_trap_43_links_have_the_public_address(
    backend: ScriptedBackend, config: Config, files: dict[str, bytes]
) -> None:
    public = config.model_copy(
        update={"http": config.http.model_copy(update={"public_url": "https://x.org/a/"})}
    )
    for settings, start in ((public, "https://x.org/a/api/v1/"), (config, "http://server/prefix/api/v1/")):
        transport = httpx.ASGITransport(app=create_app(lambda: backend, settings), root_path="/prefix")
        async with httpx.AsyncClient(transport=transport, headers={"X-API-Key": "tml-x"}) as client:
            answer = await client.get(f"http://server/prefix/api/v1{BASE}/external_weights_urls")
            assert all(url.startswith(start) for url in answer.json()["urls"].values())


async def test_trap_44_the_proof_is_in_the_query(client: httpx.AsyncClient, files: dict[str, bytes]) -> None:
    urls = (await client.get(f"{BASE}/external_weights_urls")).json()["urls"]
    for url in urls.values():
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)
        assert set(query) == {"tenant", "expires", "token"}
        assert "tml-test" not in url


@pytest.mark.parametrize("size", [0, 2**33 - 1, 2**33, 2**40])
def test_files_of_any_size_have_a_header_of_one_block(size: int) -> None:
    header = downloads._header("adapter_model.safetensors", size)
    assert len(header) == 512
    assert tarfile.TarInfo.frombuf(header, "utf-8", "strict").size == size


def test_a_link_expires() -> None:
    clock = [1000.0]
    links = Links(b"secret", lambda: clock[0])
    query = urllib.parse.parse_qs(links.sign("t", "downloads/x")[0])
    expires, token = int(query["expires"][0]), query["token"][0]
    links.check("t", "downloads/x", expires, token)
    clock[0] += LIFETIME_S + 1
    with pytest.raises(Unauthorized, match="expired"):
        links.check("t", "downloads/x", expires, token)
    with pytest.raises(Unauthorized):
        Links(b"other", lambda: 1000.0).check("t", "downloads/x", expires, token)
