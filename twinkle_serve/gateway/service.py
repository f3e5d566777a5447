"""The server itself: configuration for clients, health, capabilities, telemetry, login of the CLI.

Knows what clients are told at their start. Does not know sessions or runs.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from twinkle_serve.gateway.context import Authenticated, gateway_of
from twinkle_serve.gateway.http import no_content, refusal, reply
from twinkle_serve.protocol.errors import BackendUnavailable

router = APIRouter(tags=["service"])

# Chunks in order and large: fewer requests, and no gaps to wait for. Training batches of up to 64 MB
# stay in one request.
CLIENT_CONFIG: dict[str, Any] = {
    "pjwt_auth_enabled": False,
    "credential_default_source": "api_key",
    "parallel_fwdbwd_chunks": False,
    "proto_compress_fwdbwd": False,
    "fwdbwd_max_chunk_len": 16_384,
    "fwdbwd_max_chunk_bytes_count": 64_000_000,
    "fwdbwd_dispatch_bytes_semaphore_size": 128_000_000,
    "sample_enable_stuck_detection": True,
    "sample_join_sampling_session": False,
    "create_model_via_load_weights": True,
}
DYNAMIC_CONFIG = {
    "refresh_interval_sec": 300,
    "sample_cancel_enabled": True,
    "sample_cancel_max_batch_size": 64,
}


@router.post("/client/config")
async def client_config(call: Authenticated) -> Response:
    """What a client asks first of all."""
    models = call.gateway.config.models
    # As many samples as the busiest model takes in keep it busy. More would only stand in line at the HTTP
    # proxy, which is first come first served, and keep heartbeats waiting for seconds.
    room = max(64, *(2 * model.sampler.max_batch for model in models))
    here = {
        "sample_max_concurrent_requests": room,
        "sample_use_retrieve_futures": call.gateway.config.http.one_poll_for_samples,
        "custom_loss_server_side": call.gateway.config.losses.custom_loss_server_side,
    }
    return reply(CLIENT_CONFIG | here)


@router.post("/client/dynamic_config")
async def dynamic_config(call: Authenticated) -> Response:
    """What a client asks again every few minutes."""
    return reply(DYNAMIC_CONFIG)


@router.get("/healthz")
async def healthz(request: Request) -> Response:
    """True only if the engine can step. Needs no key, so that probes can ask."""
    try:
        healthy = await gateway_of(request).backend_provider().healthy()
    except BackendUnavailable:
        healthy = False
    return reply({"status": "ok"}) if healthy else refusal(503, "the engine is not ready")


@router.get("/get_server_capabilities")
async def capabilities(call: Authenticated) -> Response:
    models = [
        {
            "model_name": model.name,
            "max_context_length": model.max_context_length,
            "trainable": True,
            "sampleable": True,
        }
        for model in await call.backend.models()
    ]
    return reply({"supported_models": models})


@router.post("/telemetry")
async def telemetry(request: Request, call: Authenticated) -> Response:
    """Accepted and dropped."""
    await call.body(request)
    return reply({"status": "accepted"})


@router.get("/auth/apikey/me")
async def api_key_owner(call: Authenticated) -> Response:
    """What ``tinker auth login`` shows of a key."""
    return reply(
        {
            "key_id": int(call.tenant[:12], 16) if _is_hex(call.tenant) else 0,
            "name": call.name,
            "note": "",
            "details": {"org_details": {"name": "twinkle-serve"}, "user_details": {"email": ""}},
        }
    )


@router.delete("/auth/apikey/me")
async def delete_api_key(request: Request, call: Authenticated) -> Response:
    """What ``tinker auth logout`` asks for: the key that it sends is revoked."""
    await call.gateway.identity.revoke(request.headers)
    return no_content()


def _is_hex(text: str) -> bool:
    return all(char in "0123456789abcdef" for char in text)
