"""A backend that does what a test tells it and remembers what it was asked.

Knows the Backend interface. Orders nothing, computes nothing, owns no rule: control/ is tested on its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twinkle_serve.control.backend import Command, Ended, NotFound, Poll, RunInfo
from twinkle_serve.protocol.data import LoraSpec, SampleDelta, SampleRequest
from twinkle_serve.protocol.work import Failure, ModelInfo

MODEL = ModelInfo(
    name="Qwen/Tiny",
    arch="Qwen3ForCausalLM",
    tokenizer_id="/models/tiny",
    vocab_size=100,
    max_context_length=32,
    max_rank=32,
    max_slots=4,
    eos_token_ids=(2, 3),
)


@dataclass
class ScriptedBackend:
    """calls: (method, arguments) in order. polls: what a poll for an id answers; a missing id is gone,
    None is pending until ``settle``. error: raised by every method while it is set."""

    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    polls: dict[str, Poll | None] = field(default_factory=dict)
    tenants: dict[str, str] = field(default_factory=dict)
    deduped: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    commands: list[tuple[str, int | None, Command]] = field(default_factory=list)
    samples: list[SampleRequest | Failure] = field(default_factory=list)
    holds: list[float] = field(default_factory=list)
    checkpoints: list[Mapping[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    losses: dict[str, str] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    insight: dict[str, Any] = field(default_factory=dict)
    cluster: dict[str, Any] = field(default_factory=dict)
    deltas: list[SampleDelta] = field(default_factory=list)
    is_healthy: bool = True
    error: Exception | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    def settle(self, request_id: str, poll: Poll) -> None:
        self.polls[request_id] = poll
        self.settled.set()

    def asked(self, method: str) -> list[tuple[Any, ...]]:
        return [arguments for name, arguments in self.calls if name == method]

    def _note(self, method: str, *arguments: Any) -> None:
        self.calls.append((method, arguments))
        if self.error is not None:
            raise self.error

    def _owned(self, tenant: str, object_id: str) -> None:
        if self.tenants.setdefault(object_id, tenant) != tenant or "unknown" in object_id:
            raise NotFound(f"{object_id!r} does not exist")

    def _once(self, prefix: str, *key: Any) -> str:
        if key not in self.deduped:
            request_id = f"{prefix}-{len(self.deduped)}"
            self.deduped[key] = request_id
            self.polls.setdefault(request_id, None)
        found: str = self.deduped[key]
        return found

    # service and sessions --------------------------------------------------------------------------

    async def healthy(self) -> bool:
        self._note("healthy")
        return self.is_healthy

    async def models(self) -> Sequence[ModelInfo]:
        self._note("models")
        return [MODEL]

    async def create_session(self, tenant: str, info: Mapping[str, Any]) -> str:
        self._note("create_session", tenant, info)
        return "session-1"

    async def heartbeat(self, tenant: str, session_id: str) -> bool:
        self._note("heartbeat", tenant, session_id)
        self._owned(tenant, session_id)
        return session_id not in self.finished

    async def finish_session(self, tenant: str, session_id: str, reason: Mapping[str, Any]) -> None:
        self._note("finish_session", tenant, session_id, reason)
        self._owned(tenant, session_id)
        self.finished.add(session_id)

    async def list_sessions(self, tenant: str, limit: int, offset: int) -> list[str]:
        self._note("list_sessions", tenant, limit, offset)
        return ["session-1"]

    async def get_session(self, tenant: str, session_id: str) -> Mapping[str, Any]:
        self._note("get_session", tenant, session_id)
        self._owned(tenant, session_id)
        return {"training_run_ids": ["session-1:train:0"], "sampler_ids": []}

    # training -------------------------------------------------------------------------------------

    async def create_model(
        self,
        tenant: str,
        session_id: str,
        model_seq_id: int,
        base_model: str,
        spec: LoraSpec,
        user_metadata: Mapping[str, Any],
    ) -> str:
        self._note("create_model", tenant, session_id, model_seq_id, base_model, spec, user_metadata)
        if base_model != MODEL.name:
            raise NotFound(f"base_model {base_model!r} is not served; served are {MODEL.name}")
        request_id = self._once("train", session_id, model_seq_id)
        self.polls[request_id] = Poll("done", value={"model_id": f"{session_id}:train:{model_seq_id}"})
        return request_id

    async def create_model_from(
        self,
        tenant: str,
        session_id: str,
        model_seq_id: int,
        path: str,
        optimizer: bool,
        base_model: str | None,
        user_metadata: Mapping[str, Any],
    ) -> str:
        self._note("create_model_from", tenant, session_id, model_seq_id, path, optimizer, base_model)
        request_id = self._once("train", session_id, model_seq_id)
        model_id = f"{session_id}:train:{model_seq_id}"
        self.polls[request_id] = Poll("done", value={"model_id": model_id, "path": path})
        return request_id

    async def submit(self, tenant: str, run_id: str, seq_id: int | None, command: Command) -> str:
        self._note("submit", tenant, run_id, seq_id, command)
        self._owned(tenant, run_id)
        known = (run_id, seq_id) in self.deduped
        request_id = self._once("train", run_id, seq_id if seq_id is not None else object())
        if not known:
            self.commands.append((run_id, seq_id, command))
        return request_id

    async def run_info(self, tenant: str, run_id: str) -> RunInfo:
        self._note("run_info", tenant, run_id)
        self._owned(tenant, run_id)
        return RunInfo(run_id, tenant, MODEL, LoraSpec(8))

    async def create_custom_loss(
        self, tenant: str, session_id: str, seq_id: int, graph: str | Failure
    ) -> str:
        self._note("create_custom_loss", tenant, session_id, seq_id, graph)
        self._owned(tenant, session_id)
        request_id = self._once("train", session_id, "loss", seq_id)
        if isinstance(graph, Failure):
            self.polls[request_id] = Poll("done", failure=graph)
        else:
            loss_id = f"{session_id}:loss:{seq_id}"
            self.losses[loss_id] = graph
            self.polls[request_id] = Poll("done", value={"loss_id": loss_id})
        return request_id

    async def custom_loss(self, tenant: str, loss_id: str) -> str:
        self._note("custom_loss", tenant, loss_id)
        if loss_id not in self.losses or self.tenants.get(loss_id.partition(":loss:")[0]) != tenant:
            raise NotFound(f"loss_id {loss_id!r} does not exist")
        return self.losses[loss_id]

    # sampling -------------------------------------------------------------------------------------

    async def create_sampler(
        self, tenant: str, session_id: str, seq: int, base_model: str | None, model_path: str | None
    ) -> str:
        self._note("create_sampler", tenant, session_id, seq, base_model, model_path)
        return f"{session_id}:sample:{seq}"

    async def sampler_info(self, tenant: str, sampler_id: str) -> Mapping[str, Any]:
        self._note("sampler_info", tenant, sampler_id)
        self._owned(tenant, sampler_id)
        return {"sampler_id": sampler_id, "base_model": MODEL.name, "model_path": None, "model": MODEL}

    async def sample(
        self, tenant: str, sampler_id: str, seq_id: int | None, request: SampleRequest | Failure
    ) -> tuple[str, list[str]]:
        self._note("sample", tenant, sampler_id, seq_id, request)
        self._owned(tenant, sampler_id)
        self.samples.append(request)
        count = 1 if isinstance(request, Failure) else request.num_samples
        request_id = self._once("sample", sampler_id, seq_id)
        return request_id, [f"{request_id}.{index}" for index in range(count)]

    async def sample_model(
        self, tenant: str, base_model: str | None, path: str | None, request: SampleRequest, stream: bool
    ) -> str:
        self._note("sample_model", tenant, base_model, path, request, stream)
        self.samples.append(request)
        return self._once("sample", len(self.samples))

    async def cancel(self, tenant: str, request_id: str) -> None:
        self._note("cancel", tenant, request_id)

    # promises -------------------------------------------------------------------------------------

    async def poll_samples(
        self, tenant: str, sampler_id: str, clone: int, cursor: int, timeout_s: float
    ) -> tuple[tuple[Ended, ...], int] | None:
        self._note("poll_samples", tenant, sampler_id, clone, cursor, timeout_s)
        return (), cursor

    async def poll(self, tenant: str, request_id: str, timeout_s: float) -> Poll:
        self._note("poll", tenant, request_id)
        self.holds.append(timeout_s)
        if request_id not in self.polls:
            return Poll("gone")
        if self.polls[request_id] is None:
            try:
                await asyncio.wait_for(self.settled.wait(), timeout_s)
            except TimeoutError:
                return Poll("pending", queue_state="paused_capacity", queue_reason="position 3")
        found = self.polls[request_id]
        return found if found is not None else Poll("pending")

    async def follow(self, tenant: str, request_id: str, after: int, timeout_s: float) -> Poll:
        self._note("follow", tenant, request_id, after)
        if self.deltas[after:]:
            return Poll("pending", value=tuple(self.deltas[after:]))
        return await self.poll(tenant, request_id, timeout_s)

    async def run_insight(self, tenant: str, run_id: str, curves: bool = True) -> Mapping[str, Any]:
        self._note("run_insight", tenant, run_id)
        self._owned(tenant, run_id)
        return self.insight

    async def report_metrics(
        self, tenant: str, run_id: str, step: float | None, values: Mapping[str, float]
    ) -> None:
        self._note("report_metrics", tenant, run_id, step, values)
        self._owned(tenant, run_id)

    async def session_trace(self, tenant: str, session_id: str) -> Mapping[str, Any]:
        self._note("session_trace", tenant, session_id)
        self._owned(tenant, session_id)
        return {"traceEvents": [{"name": "passes"}]}

    async def cluster_view(self) -> Mapping[str, Any]:
        self._note("cluster_view")
        return self.cluster

    # management -----------------------------------------------------------------------------------

    async def list_runs(
        self, tenant: str, limit: int, offset: int, project_id: str | None = None
    ) -> tuple[list[Mapping[str, Any]], int]:
        self._note("list_runs", tenant, limit, offset)
        return [await self.get_run(tenant, "session-1:train:0")], 1

    async def get_run(self, tenant: str, run_id: str) -> Mapping[str, Any]:
        self._note("get_run", tenant, run_id)
        self._owned(tenant, run_id)
        return {
            "training_run_id": run_id,
            "base_model": MODEL.name,
            "model_owner": tenant,
            "is_lora": True,
            "lora_rank": 8,
            "last_request_time": "2026-01-02T03:04:05Z",
        }

    async def list_checkpoints(
        self, tenant: str, run_id: str | None, limit: int | None, offset: int
    ) -> tuple[list[Mapping[str, Any]], int]:
        self._note("list_checkpoints", tenant, run_id, limit, offset)
        return self.checkpoints, len(self.checkpoints)

    async def weights_info(self, tenant: str, path: str) -> Mapping[str, Any]:
        self._note("weights_info", tenant, path)
        return {"base_model": MODEL.name, "is_lora": True, "lora_rank": 8}

    async def delete_checkpoint(self, tenant: str, path: str) -> None:
        self._note("delete_checkpoint", tenant, path)

    async def publish_checkpoint(self, tenant: str, path: str, public: bool) -> None:
        self._note("publish_checkpoint", tenant, path, public)

    async def set_checkpoint_ttl(self, tenant: str, path: str, ttl_seconds: int | None) -> None:
        self._note("set_checkpoint_ttl", tenant, path, ttl_seconds)

    async def checkpoint_files(self, tenant: str, path: str, owned: bool = False) -> Mapping[str, str]:
        self._note("checkpoint_files", tenant, path)
        return self.files
