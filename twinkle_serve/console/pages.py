"""The pages that show something: runs, one run, checkpoints, the playground, the cluster.

Knows which page needs what. Changes nothing (actions.py does).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from twinkle_serve.console.render import language_of, page
from twinkle_serve.console.texts import TEXTS, translator
from twinkle_serve.console.visitors import SignedIn, Visitor
from twinkle_serve.gateway.http import reply
from twinkle_serve.protocol.paths import parse_path

router = APIRouter()
PAGE_SIZE = 25
Offset = Annotated[int, Query(ge=0, lt=2**31)]
Words = Callable[..., str]


@router.get("/")
async def runs(request: Request, visitor: SignedIn, offset: Offset = 0) -> Response:
    call = visitor.call
    found, total = await call.backend.list_runs(call.tenant, PAGE_SIZE, offset)
    insights = await asyncio.gather(
        *(call.backend.run_insight(call.tenant, run["training_run_id"], False) for run in found)
    )
    words = translator(language_of(request))
    shown = [_run_row(run, insight, words) for run, insight in zip(found, insights, strict=True)]
    return page(request, "runs.html", visitor=visitor, runs=shown, **_paging(offset, len(found), total))


@router.get("/runs/{run_id}")
async def run(request: Request, run_id: str, visitor: SignedIn) -> Response:
    call = visitor.call
    found = await call.backend.get_run(call.tenant, run_id)
    insight = await call.backend.run_insight(call.tenant, run_id, False)
    checkpoints, _ = await call.backend.list_checkpoints(call.tenant, run_id, None, 0)
    words = translator(language_of(request))
    return page(
        request,
        "run.html",
        visitor=visitor,
        run=_run_row(found, insight, words),
        checkpoints=checkpoints,
        labels={key.removeprefix("curve_"): words(key) for key in TEXTS if key.startswith("curve_")},
    )


@router.get("/runs/{run_id}/curves")
async def curves(request: Request, run_id: str, visitor: SignedIn, version: int = -1) -> Response:
    """JSON for the charts; without the curves if the page has this version of them."""
    call = visitor.call
    insight = dict(await call.backend.run_insight(call.tenant, run_id))
    status = insight.pop("status")
    answer = {"status": status_in_words(status, translator(language_of(request))), "state": status["state"]}
    if insight["version"] != version:
        answer |= insight
    return reply(answer)


@router.get("/checkpoints")
async def checkpoints(request: Request, visitor: SignedIn, offset: Offset = 0, done: str = "") -> Response:
    call = visitor.call
    found, total = await call.backend.list_checkpoints(call.tenant, None, PAGE_SIZE, offset)
    done = done if done in ("published", "unpublished", "deleted", "kept") else ""
    paging = _paging(offset, len(found), total)
    return page(request, "checkpoints.html", visitor=visitor, checkpoints=found, done=done, **paging)


@router.get("/playground")
async def playground(request: Request, visitor: SignedIn, checkpoint: str = "") -> Response:
    call = visitor.call
    models = await call.backend.models()
    found, _ = await call.backend.list_checkpoints(call.tenant, None, 200, 0)
    usable = [item for item in found if item["checkpoint_type"] in ("training", "sampler")]
    bases = await _base_models(visitor, {parse_path(item["tinker_path"]).run_id for item in usable})
    choices = [
        {"path": item["tinker_path"], "base_model": bases[parse_path(item["tinker_path"]).run_id]}
        for item in usable
    ]
    return page(
        request,
        "playground.html",
        visitor=visitor,
        models=[model.name for model in models],
        choices=choices,
        chosen=checkpoint,
    )


@router.get("/cluster")
async def cluster(request: Request, visitor: SignedIn) -> Response:
    if not visitor.is_operator:
        words = translator(language_of(request))
        return page(request, "error.html", 403, visitor=visitor, message=words("operators_only"), retry=False)
    view = await visitor.call.backend.cluster_view()
    return page(request, "cluster.html", visitor=visitor, view=view, measures=_measures(view))


def status_in_words(status: Mapping[str, Any], words: Words) -> str:
    state = status["state"]
    text = words(f"state_{state}", missing=status.get("missing"))
    if state == "waiting":
        seconds = status.get("seconds")
        key = "position" if seconds is None else "position_seconds"
        text += ": " + words(key, position=status["position"], seconds=math.ceil(seconds or 0))
    return text


def _run_row(run: Mapping[str, Any], insight: Mapping[str, Any], words: Words) -> dict[str, Any]:
    return {
        **run,
        "num_steps": insight["num_steps"],
        "total_tokens": insight["total_tokens"],
        "loss": insight["loss"],
        "state": insight["status"]["state"],
        "status": status_in_words(insight["status"], words),
        "num_waiting": insight["status"]["num_waiting"],
    }


def _paging(offset: int, shown: int, total: int) -> dict[str, Any]:
    return {
        "first": offset + 1 if shown else 0,
        "last": offset + shown,
        "total": total,
        "newer": max(0, offset - PAGE_SIZE) if offset else None,
        "older": offset + PAGE_SIZE if offset + shown < total else None,
    }


async def _base_models(visitor: Visitor, run_ids: set[str]) -> dict[str, str]:
    call = visitor.call
    ids = sorted(run_ids)
    runs = await asyncio.gather(*(call.backend.get_run(call.tenant, run_id) for run_id in ids))
    return {run_id: run["base_model"] for run_id, run in zip(ids, runs, strict=True)}


def _measures(view: Mapping[str, Any]) -> dict[str, list[tuple[str, float]]]:
    """By model: the name and value of each gauge that has words."""
    return {
        model["name"]: [
            (name, value) for name, value in model["gauges"].items() if f"measure_{name}" in TEXTS
        ]
        for model in view["models"]
    }
