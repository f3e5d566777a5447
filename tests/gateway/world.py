"""The HTTP application over a real control plane and a group that computes nothing, with two tenants in it.

Knows how to make one of each kind of object for a tenant. Does not know which routes there are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.control.echo_group import EchoGroup
from twinkle_serve.config import Config
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.gateway.app import create_app
from twinkle_serve.storage.catalog import Catalog
from twinkle_serve.storage.ledger import Ledger

BASE_URL = "http://server"
API = f"{BASE_URL}/api/v1"


def make_config(root: Path, **sections: Any) -> Config:
    return Config.model_validate(
        {
            "models": [{"name": "base", "path": str(root)}],
            "storage": {"root": str(root)},
            "http": {"poll_hold_s": 5},
            **sections,
        }
    )


@dataclass
class Tenant:
    """objects: by the name of the kind. Requests go out with the tenant's key, however they end."""

    key: str
    http: httpx.AsyncClient
    objects: dict[str, str] = field(default_factory=dict)

    async def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"X-API-Key": self.key, **options.pop("headers", {})}
        return await self.http.request(method, path, headers=headers, **options)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self.request("POST", f"{API}/{path}", json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def result(self, request_id: str) -> dict[str, Any]:
        status = 408
        while status == 408:
            body = {"request_id": request_id}
            answer = await self.request("POST", f"{API}/retrieve_future", json=body)
            status = answer.status_code
        assert status == 200, answer.text
        result: dict[str, Any] = answer.json()
        assert "error" not in result, result
        return result

    async def do(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return await self.result((await self.post(path, body))["request_id"])

    async def open_session(self) -> str:
        self.objects["session"] = (await self.post("create_session", {}))["session_id"]
        return self.objects["session"]

    async def create_run(self, number: int = 0) -> str:
        body = {"session_id": self.objects["session"], "model_seq_id": number, "base_model": "base"}
        return str((await self.do("create_model", body | {"lora_config": {"rank": 8}}))["model_id"])

    async def settle(self) -> Tenant:
        """Make one of each kind of object."""
        session = await self.open_session()
        run = self.objects["run"] = await self.create_run()
        saved = await self.do("save_weights", {"model_id": run, "seq_id": 1, "path": "a"})
        self.objects["checkpoint"] = saved["path"]
        for seq_id, path in ((2, "save_weights_for_sampler"), (3, "save_weights_external")):
            await self.do(path, {"model_id": run, "seq_id": seq_id, "path": "a"})
        promised = await self.post("optim_step", {"model_id": run, "seq_id": 4, "adam_params": {}})
        self.objects["promise"] = promised["request_id"]
        body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "base"}
        made = await self.post("create_sampling_session", body)
        self.objects["sampler"] = made["sampling_session_id"]
        return self


@dataclass
class World:
    plane: ControlPlane
    group: EchoGroup
    http: httpx.AsyncClient

    def tenant(self, key: str) -> Tenant:
        return Tenant(key, self.http)


@asynccontextmanager
async def world(root: Path, **sections: Any) -> AsyncIterator[World]:
    """Everything in this process and this loop."""
    config = make_config(root, **sections)
    group = EchoGroup(pass_s=0.0)
    group.decode_s = 0.001
    group.on_disk = True
    catalog = Catalog(root, "sqlite://")
    ledger = Ledger(root)
    plane = ControlPlane({"base": group}, catalog, config, ledger=ledger)
    await plane.start()
    app = create_app(lambda: plane, config)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url=BASE_URL) as http:
            yield World(plane, group, http)
    finally:
        await plane.close()
        ledger.close()
        catalog.close()
