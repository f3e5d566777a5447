"""What a client may name as ``model``: a base model of this server, or a checkpoint of its own.

Knows where the tokenizer of a base model lies. Does not know how text becomes a sample.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from twinkle_serve.config import Config
from twinkle_serve.control.backend import NotFound
from twinkle_serve.gateway.context import Authenticated, Call
from twinkle_serve.gateway.http import reply
from twinkle_serve.gateway.openai.tokenizer import ModelText
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.paths import parse_path
from twinkle_serve.protocol.work import ModelInfo

logger = logging.getLogger(__name__)
router = APIRouter(tags=["openai"])

_MAX_LISTED = 1000
# Kinds of checkpoints that hold an adapter in the form that is sampled from.
_SAMPLEABLE = ("training", "sampler")


@dataclass(frozen=True, slots=True)
class Target:
    """What to sample from: ``path`` None is the base model alone."""

    name: str
    info: ModelInfo
    path: str | None


async def find(call: Call, name: str) -> Target:
    """The base model or checkpoint called ``name``. Raises NotFound for what the caller may not see."""
    path, base_model = None, name
    if "://" in name:
        path = str(parse_path(name))
        base_model = (await call.backend.weights_info(call.tenant, path))["base_model"]
    for info in await call.backend.models():
        if info.name == base_model:
            return Target(name, info, path)
    raise NotFound(f"the model {name!r:.200} does not exist")


class Texts:
    """The tokenizers of this replica's base models, each read when it is first needed."""

    def __init__(self, config: Config) -> None:
        self._models = {model.name: model for model in config.models}
        self._texts: dict[str, asyncio.Task[ModelText]] = {}

    async def of(self, info: ModelInfo) -> ModelText:
        """Raises UserError if the model's files have no tokenizer or are not on this machine."""
        task = self._texts.get(info.name)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(asyncio.to_thread(self._read, info))
            self._texts[info.name] = task
        return await asyncio.shield(task)

    def _read(self, info: ModelInfo) -> ModelText:
        directory = Path(info.tokenizer_id)
        if not directory.is_absolute():
            directory = _snapshot(info.tokenizer_id, self._models[info.name].revision)
        return ModelText(directory)


def _snapshot(model_id: str, revision: str | None) -> Path:
    """Where the ranks' download of a hub model lies. Nothing is downloaded."""
    from modelscope import snapshot_download

    try:
        return Path(snapshot_download(model_id, revision=revision, local_files_only=True))
    except Exception as error:
        logger.warning("no local files of %s: %s", model_id, error)
        raise UserError(f"the tokenizer of {model_id} is not on the machine that answers here") from None


@router.get("/models")
async def list_models(call: Authenticated) -> Response:
    """The base models, then the caller's checkpoints, the newest first."""
    found, _ = await call.backend.list_checkpoints(call.tenant, None, _MAX_LISTED, 0)
    shown = [_base_model(info) for info in await call.backend.models()]
    shown += [_checkpoint(item) for item in found if item["checkpoint_type"] in _SAMPLEABLE]
    return reply({"object": "list", "data": shown})


@router.get("/models/{name:path}")
async def get_model(name: str, call: Authenticated) -> Response:
    target = await find(call, name)
    return reply(_base_model(target.info) | {"id": name})


def _base_model(info: ModelInfo) -> dict[str, Any]:
    return {
        "id": info.name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "twinkle-serve",
        "max_model_len": info.max_context_length,
    }


def _checkpoint(item: Mapping[str, Any]) -> dict[str, Any]:
    created = datetime.fromisoformat(item["time"]).timestamp()
    return {"id": item["tinker_path"], "object": "model", "created": int(created), "owned_by": "you"}


_STARTED = int(time.time())
