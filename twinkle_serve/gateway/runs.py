"""Listings of training runs and checkpoints, and what one checkpoint's path leads to.

Knows paging and what older clients cannot read. Does not know where any of it is stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from twinkle_serve.gateway.context import Authenticated
from twinkle_serve.gateway.http import describes, reply
from twinkle_serve.gateway.sessions import Limit, Offset
from twinkle_serve.protocol.paths import parse_path
from twinkle_serve.protocol.requests import WeightsInfo, read

router = APIRouter(tags=["runs"])
# The first SDK whose listings know exported checkpoints; older ones refuse the whole page.
_KNOWS_EXTERNAL = (0, 38)


@router.get("/training_runs")
async def list_runs(
    call: Authenticated, limit: Limit = 20, offset: Offset = 0, project_id: str | None = None
) -> Response:
    runs, total = await call.backend.list_runs(call.tenant, limit, offset, project_id)
    page = {"training_runs": runs, "cursor": _cursor(limit, offset, total)}
    return reply(page)


@router.get("/training_runs/{run_id}")
async def get_run(run_id: str, call: Authenticated) -> Response:
    return reply(await call.backend.get_run(call.tenant, run_id))


@router.get("/training_runs/{run_id}/checkpoints")
async def list_run_checkpoints(run_id: str, request: Request, call: Authenticated) -> Response:
    """All of a run's checkpoints; this listing has no pages."""
    found, _ = await call.backend.list_checkpoints(call.tenant, run_id, None, 0)
    return reply({"checkpoints": _shown(found, request)})


@router.get("/checkpoints")
async def list_checkpoints(
    request: Request, call: Authenticated, limit: Limit = 100, offset: Offset = 0
) -> Response:
    if _knows_all(request):
        found, total = await call.backend.list_checkpoints(call.tenant, None, limit, offset)
    else:  # who pages by what was shown must find the hidden ones in no count
        everything, _ = await call.backend.list_checkpoints(call.tenant, None, None, 0)
        known = _shown(everything, request)
        found, total = known[offset : offset + limit], len(known)
    return reply({"checkpoints": found, "cursor": _cursor(limit, offset, total)})


@router.post("/weights_info", openapi_extra=describes(WeightsInfo))
async def weights_info(request: Request, call: Authenticated) -> Response:
    body = read(WeightsInfo, await call.object(request))
    return reply(dict(await call.backend.weights_info(call.tenant, str(parse_path(body.tinker_path)))))


def client_version(headers: Mapping[str, str]) -> tuple[int, ...] | None:
    """The SDK's version, or None for other clients."""
    found = re.search(r"Tinker/Python (\d+)\.(\d+)", headers.get("user-agent", ""))
    return None if found is None else (int(found[1]), int(found[2]))


def _knows_all(request: Request) -> bool:
    version = client_version(request.headers)
    return version is None or version >= _KNOWS_EXTERNAL


def _shown(checkpoints: list[Mapping[str, Any]], request: Request) -> list[Mapping[str, Any]]:
    knows_all = _knows_all(request)
    return [item for item in checkpoints if knows_all or item.get("checkpoint_type") != "external"]


def _cursor(limit: int, offset: int, total: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total}
