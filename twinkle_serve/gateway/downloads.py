"""Files of a checkpoint: links to them, the files themselves, and one tar of all for old SDKs.

The clients fetch links by plain urllib, with no key and a minute's patience, so a link carries its own proof
and every answer its length. Knows local files. Does not know what they mean.
"""

from __future__ import annotations

import asyncio
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import IO, Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, Response, StreamingResponse

from twinkle_serve.gateway.checkpoints import CHECKPOINT_PREFIX, CheckpointUrl, tinker_path
from twinkle_serve.gateway.context import Authenticated, Gateway, gateway_of
from twinkle_serve.gateway.http import reply
from twinkle_serve.gateway.links import resource_path
from twinkle_serve.protocol.errors import Absent
from twinkle_serve.storage.checkpoints import MANIFEST, CheckpointError, open_whole

router = APIRouter(tags=["downloads"])
_ALL = "archive.tar"
# SDK 0.18 looks for this member before it believes that an archive is whole.
_COMPLETE = "checkpoint_complete"
_BLOCK = tarfile.BLOCKSIZE
_READ_BYTES = 2**20

Text = Annotated[str, Query(max_length=200)]
Expires = Annotated[int, Query(ge=0, lt=2**40)]


@router.get(CHECKPOINT_PREFIX + "/external_weights_urls")
async def external_weights_urls(
    call: Authenticated, run_id: str, kind: str, name: str, path: CheckpointUrl, request: Request
) -> Response:
    """A link for each file."""
    expires, urls = 0, {}
    for file in await call.backend.checkpoint_files(call.tenant, path):
        if file == MANIFEST:  # what the server keeps for itself
            continue
        urls[file], expires = _link(call.gateway, request, call.tenant, run_id, kind, name, file)
    return reply({"urls": urls, "expires": datetime.fromtimestamp(expires, UTC).isoformat()})


@router.get(CHECKPOINT_PREFIX + "/archive")
async def archive(
    call: Authenticated, run_id: str, kind: str, name: str, path: CheckpointUrl, request: Request
) -> Response:
    """SDKs up to 0.25: a redirect to one tar of all files."""
    await call.backend.checkpoint_files(call.tenant, path)
    url, expires = _link(call.gateway, request, call.tenant, run_id, kind, name, _ALL)
    until = format_datetime(datetime.fromtimestamp(expires, UTC), usegmt=True)
    return Response(status_code=302, headers={"Location": url, "Expires": until})


@router.get("/downloads/{run_id}/{kind}/{name}/{file}")
async def download(
    run_id: str,
    kind: str,
    name: str,
    file: str,
    request: Request,
    tenant: Text,
    expires: Expires,
    token: Text,
) -> Response:
    """What a link leads to."""
    gateway = gateway_of(request)
    gateway.links.check(tenant, resource_path("downloads", run_id, kind, name, file), expires, token)
    files = await gateway.backend_provider().checkpoint_files(tenant, tinker_path(run_id, kind, name))
    if file == _ALL:
        try:
            size, stream = await asyncio.to_thread(tar_of, Path(files[MANIFEST]).parent)
        except CheckpointError:
            raise Absent("the checkpoint is not there any more") from None
        return StreamingResponse(
            stream, media_type="application/x-tar", headers={"Content-Length": str(size)}
        )
    if file not in files:
        raise Absent(f"the checkpoint has no file {file!r:.80}")
    return FileResponse(files[file], media_type="application/octet-stream")


def tar_of(directory: Path) -> tuple[int, Iterator[bytes]]:
    """The size and the bytes of a tar of a checkpoint's files as they are now, whatever is saved or deleted
    meanwhile, and of a marker at its end that it is whole. Blocks. Raises CheckpointError."""
    stack, files = open_whole(directory)
    sizes = [_BLOCK + size + -size % _BLOCK for _, size in files.values()]
    stream = _stream(stack, files)
    next(stream)  # from here on it closes the files itself, even if nobody ever reads from it
    return sum(sizes) + 3 * _BLOCK, stream


def _stream(stack: ExitStack, files: Mapping[str, tuple[IO[bytes], int]]) -> Iterator[bytes]:
    with stack:
        yield b""
        for name, (file, size) in files.items():
            yield _header(name, size)
            while part := file.read(_READ_BYTES):
                yield part
            yield bytes(-size % _BLOCK)
        yield _header(_COMPLETE, 0) + bytes(2 * _BLOCK)


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    # GNU's form, which unlike ustar's has room for sizes from 8 GiB on in the same block.
    return member.tobuf(tarfile.GNU_FORMAT)


def _link(
    gateway: Gateway, request: Request, tenant: str, run_id: str, kind: str, name: str, file: str
) -> tuple[str, int]:
    """An absolute URL that the client can reach, and when it expires."""
    resource = resource_path("downloads", run_id, kind, name, file)
    query, expires = gateway.links.sign(tenant, resource)
    base = (gateway.config.http.public_url or str(request.base_url)).rstrip("/")
    return f"{base}/api/v1/{resource}?{query}", expires
