"""Random and damaged bodies on every route: never a 5xx, never a hang, always a readable answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gateway.scripted import ScriptedBackend
from tests.protocol import sdk_bodies as sdk
from twinkle_serve.config import Config
from twinkle_serve.gateway.app import create_app

ROUTES = [
    ("POST", "create_session"),
    ("POST", "session_heartbeat"),
    ("POST", "sessions/s/finish"),
    ("POST", "create_model"),
    ("POST", "get_info"),
    ("POST", "forward_backward"),
    ("POST", "forward"),
    ("POST", "optim_step"),
    ("POST", "save_weights"),
    ("POST", "save_weights_for_sampler"),
    ("POST", "save_weights_external"),
    ("POST", "load_weights"),
    ("POST", "unload_model"),
    ("POST", "create_sampling_session"),
    ("POST", "asample"),
    ("POST", "cancel_future"),
    ("POST", "retrieve_future"),
    ("POST", "retrieve_futures"),
    ("POST", "weights_info"),
    ("POST", "telemetry"),
    ("POST", "client/config"),
    ("PUT", "training_runs/r/checkpoints/weights/a/ttl"),
]
KEYS = st.sampled_from(
    [
        "model_id",
        "seq_id",
        "session_id",
        "model_seq_id",
        "base_model",
        "lora_config",
        "rank",
        "adam_params",
        "learning_rate",
        "path",
        "ttl_seconds",
        "sampling_session_id",
        "sampling_session_seq_id",
        "prompt",
        "chunks",
        "tokens",
        "sampling_params",
        "stop",
        "seed",
        "num_samples",
        "forward_backward_input",
        "forward_input",
        "data",
        "loss_fn",
        "loss_fn_config",
        "model_input",
        "loss_fn_inputs",
        "target_tokens",
        "weights",
        "dtype",
        "shape",
        "sparse_crow_indices",
        "sparse_col_indices",
        "request_id",
        "user_metadata",
        "optimizer",
        "reason",
        "type",
        "target_prompt_logprobs",
        "max_tokens",
        "temperature",
        "tinker_path",
    ]
)
VALUES = st.sampled_from(
    [
        "r",
        "int64",
        "float32",
        "cross_entropy",
        "tinker://r/weights/a",
        0,
        1,
        -1,
        2**40,
        2**70,
        0.5,
        None,
        True,
    ]
)
BODIES = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)
QUIET = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def app() -> FastAPI:
    """One application for all examples; each gets a backend of its own."""
    config = Config.model_validate(
        {"models": [{"name": "Qwen/Tiny", "path": "/models/tiny"}], "http": {"poll_hold_s": 0.001}}
    )
    return create_app(ScriptedBackend, config)


def send(app: FastAPI, method: str, path: str, content: bytes, headers: dict[str, str]) -> None:
    async def go() -> None:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://server/api/v1"
        ) as client:
            everywhere = {"X-API-Key": "tml-x", **headers}
            answer = await asyncio.wait_for(
                client.request(method, f"/{path}", content=content, headers=everywhere), 10
            )
        assert answer.status_code < 500
        if answer.status_code >= 400:
            assert answer.json()["detail"]

    asyncio.run(go())


@pytest.mark.parametrize(("method", "path"), ROUTES)
@QUIET
@given(body=st.dictionaries(KEYS, BODIES, max_size=8))
def test_any_json(app: FastAPI, method: str, path: str, body: dict[str, Any]) -> None:
    send(app, method, path, json.dumps(body).encode(), {"Content-Type": "application/json"})


@pytest.mark.parametrize(("method", "path"), ROUTES)
@settings(QUIET, max_examples=10)
@given(body=st.binary(max_size=200))
def test_any_bytes(app: FastAPI, method: str, path: str, body: bytes) -> None:
    for headers in ({}, sdk.PROTO, {"Content-Encoding": "zstd"}):
        send(app, method, path, body, headers)


@QUIET
@given(data=st.data())
def test_damaged_protobuf(app: FastAPI, data: st.DataObject) -> None:
    body = bytearray(sdk.forward_proto([sdk.cross_entropy()] * 2))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    send(app, "POST", "forward_backward", bytes(body), sdk.PROTO)
