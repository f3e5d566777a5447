"""What can be done to one checkpoint: delete, publish, give it a lifetime.

Knows the routes. All of them answer 204 also when there was nothing to change: the SDK takes a 409 for a
reason to try again for minutes.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from twinkle_serve.gateway.context import Authenticated, Call
from twinkle_serve.gateway.http import describes, no_content
from twinkle_serve.gateway.identity import api_key
from twinkle_serve.protocol.paths import parse_path
from twinkle_serve.protocol.requests import SetTtl, read

CHECKPOINT_PREFIX = "/training_runs/{run_id}/checkpoints/{kind}/{name}"
router = APIRouter(tags=["checkpoints"], prefix=CHECKPOINT_PREFIX)


def tinker_path(run_id: str, kind: str, name: str) -> str:
    """Raises UserError when the URL does not name a checkpoint."""
    return str(parse_path(f"tinker://{run_id}/{kind}/{name}"))


# Handlers name the caller first: without a key there is nothing to say about a path.
CheckpointUrl = Annotated[str, Depends(tinker_path)]


@router.delete("")
async def delete(call: Authenticated, path: CheckpointUrl) -> Response:
    await call.backend.delete_checkpoint(call.tenant, path)
    return no_content()


@router.post("/publish")
async def publish(call: Authenticated, path: CheckpointUrl, request: Request) -> Response:
    """With ModelScope tokens the adapter is also pushed to a repository of its owner, before anybody may
    read it here."""
    await publish_as(call, path, api_key(request.headers))
    return no_content()


async def publish_as(call: Call, path: str, key: str | None) -> None:
    """The same for whoever calls: ``key`` is what the caller's repository is reached with."""
    publisher = call.gateway.publisher
    if publisher is not None and key is not None:
        files = await call.backend.checkpoint_files(call.tenant, path, True)
        await publisher.push(call.tenant, key, path, files)
    await call.backend.publish_checkpoint(call.tenant, path, True)


@router.delete("/publish")
async def unpublish(call: Authenticated, path: CheckpointUrl) -> Response:
    await call.backend.publish_checkpoint(call.tenant, path, False)
    return no_content()


@router.put("/ttl", openapi_extra=describes(SetTtl))
async def set_ttl(call: Authenticated, path: CheckpointUrl, request: Request) -> Response:
    body = read(SetTtl, await call.object(request))
    await call.backend.set_checkpoint_ttl(call.tenant, path, body.ttl_seconds)
    return no_content()
