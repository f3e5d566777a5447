"""What is counted, drawn and traced while a control plane works, in virtual time."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.plane import TENANT, Client, control_plane, optim
from tests.control.virtual_time import VirtualClock, run
from twinkle_serve.control.backend import SnapshotCommand
from twinkle_serve.control.metrics import Tally, tenant_hash
from twinkle_serve.control.spans import TRACE_PARENT, Span
from twinkle_serve.control.watch import Watch, summary_of
from twinkle_serve.protocol.data import SampledSequence, SampleResult
from twinkle_serve.protocol.work import Outcome, Tick, TickReport


class MeteredGroup(EchoGroup):
    """Passes answer a loss of 2 a token of weight 5, as metrics of a value that stays elsewhere; a tick
    says that its phases took 10 ms each."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.info = dataclasses.replace(self.info, active_parameters=1000, peak_flops=4e6)

    async def run(self, tick: Tick) -> AsyncIterator[Any]:
        passes = {item.request_id for item in tick.passes}
        async for item in super().run(tick):
            if isinstance(item, Outcome) and item.request_id in passes and item.failure is None:
                yield dataclasses.replace(item, metrics={"loss:sum": 10.0, "weight:sum": 5.0})
            elif isinstance(item, TickReport):
                yield dataclasses.replace(item, seconds={"passes": 0.01, "optim": 0.02})
            else:
                yield item


def observed(tally: Tally, name: str, **labels: str) -> list[float]:
    return tally.observed.get((name, tuple(sorted(labels.items()))), [])


async def trained(client: Client, steps: int = 2) -> str:
    run_id = await client.create()
    for step in range(steps):
        await client.do(run_id, 2 * step + 1, pass_command("p", 30, 10))
        await client.do(run_id, 2 * step + 2, optim(0.5))
    return run_id


def test_requests_tokens_and_ticks_are_counted(tmp_path: Path) -> None:
    async def program() -> Tally:
        tally = Tally()
        async with control_plane(tmp_path, MeteredGroup(), meter=tally) as plane:
            client = await Client(plane).open()
            run_id = await trained(client)
            await client.do(run_id, 5, pass_command("f", 7, backward=False))
            await client.failure(await client.submit(run_id, 6, pass_command("bad")))
            plane.measure()
        return tally

    tally = run(program())
    assert tally.total("requests", kind="forward_backward", result="done") == 2
    assert tally.total("requests", kind="forward_backward", result="user_error") == 1
    assert tally.total("requests", kind="optim_step", result="done") == 2
    assert tally.total("requests", kind="create") == 1
    assert tally.total("tokens", kind="train", tenant=tenant_hash(TENANT)) == 80
    assert tally.total("tokens", kind="forward") == 7
    assert tally.total("optimizer_steps", model="base") == 2
    assert observed(tally, "tick_runs", model="base") == [1.0] * 4
    assert observed(tally, "step_seconds", model="base", phase="optim").count(0.02) >= 5
    fill = observed(tally, "tick_fill_ratio", model="base")
    assert fill[0] == pytest.approx(40 / 16_384)
    waits = observed(tally, "queue_seconds", model="base", kind="forward_backward")
    assert len(waits) == 3
    assert all(0 <= wait < 0.1 for wait in waits)


def test_mfu_is_work_over_what_the_ranks_could_have_done(tmp_path: Path) -> None:
    async def program() -> tuple[float | None, float | None]:
        async with control_plane(tmp_path, MeteredGroup()) as plane:
            await trained(await Client(plane).open(), steps=1)
            watch = plane._books.watch
            return watch.mfu("base"), watch.mfu("base")

    first, second = run(program())
    # 40 tokens forward and backward: 2 + 2 operations a weight; one tick's passes took 10 ms.
    assert first == pytest.approx(4 * 40 * 1000 / (0.01 * 4e6))
    assert second is None, "nothing happened since"


def test_a_runs_curves_come_from_its_results(tmp_path: Path) -> None:
    async def program() -> Any:
        async with control_plane(tmp_path, MeteredGroup()) as plane:
            client = await Client(plane).open()
            run_id = await trained(client, steps=3)
            await plane.report_metrics(TENANT, run_id, 3, {"reward": 0.75})
            return await plane.run_insight(TENANT, run_id)

    view = run(program())
    assert view["steps"]["loss"] == [2.0, 2.0, 2.0]
    assert view["steps"]["learning_rate"] == [0.5, 0.5, 0.5]
    assert view["total_tokens"] == 120
    assert view["reported"]["reward"] == [0.75]
    assert view["status"] == {"state": "idle", "num_waiting": 0}


def test_a_session_is_traced_from_waiting_to_phases(tmp_path: Path) -> None:
    async def program() -> Any:
        async with control_plane(tmp_path, MeteredGroup()) as plane:
            first, second = await Client(plane).open(), await Client(plane, "bob").open()
            await trained(first, 1)
            other = await trained(second, 1)
            return other, await plane.session_trace(TENANT, first.session)

    other, trace = run(program())
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {"waiting", "forward_backward", "optim_step", "passes", "optim"} <= {s["name"] for s in spans}
    assert other not in str(trace)
    (work,) = (s for s in spans if s["name"] == "forward_backward")
    (step,) = (s for s in spans if s["name"] == "optim_step")
    assert work["ts"] + work["dur"] <= step["ts"] + step["dur"]
    assert work["args"]["seq_id"] == 1
    assert work["args"]["tokens"] == 40


def test_a_requests_trace_goes_on_into_the_tick(tmp_path: Path) -> None:
    parent = f"00-{'ab' * 16}-{'cd' * 8}-01"

    async def program() -> list[Span]:
        exported: list[Span] = []
        async with control_plane(tmp_path, MeteredGroup()) as plane:
            client = await Client(plane).open()
            run_id = await client.create()
            plane.watch.spans.export = exported.append
            token = TRACE_PARENT.set(parent)
            request_id = await client.submit(run_id, 1, pass_command("p"))
            TRACE_PARENT.reset(token)
            await client.result(request_id)
            await client.do(run_id, 2, optim())
            return exported

    spans = run(program())
    by_trace = {span.name: span.parents for span in spans if span.track == "ticks base" or span.parents}
    assert by_trace["waiting"] == by_trace["forward_backward"] == (parent,)
    ticks = [(span.name, span.parents) for span in spans if span.track == "ticks base"]
    assert ticks == [("passes", (parent,)), ("optim", (parent,)), ("passes", ()), ("optim", ())]
    assert all(span.parents == () for span in spans if span.name == "optim_step")


def test_a_lost_group_is_counted(tmp_path: Path) -> None:
    async def program() -> tuple[Tally, list[float]]:
        tally, group = Tally(), MeteredGroup()
        async with control_plane(tmp_path, group, meter=tally) as plane:
            client = await Client(plane).open()
            run_id = await trained(client, 1)
            group.crash_when = lambda tick, phase: phase == "passes"
            await client.failure(await client.submit(run_id, 3, pass_command("p")))
            group.crash_when = lambda tick, phase: False
            return tally, plane._books.watch.recoveries("base")

    tally, times = run(program())
    assert tally.total("recoveries", model="base") == 1
    assert len(times) == 1


def test_a_bug_in_a_tick_leaves_no_request_behind(tmp_path: Path) -> None:
    async def program() -> int:
        group = MeteredGroup()
        async with control_plane(tmp_path, group) as plane:
            client = await Client(plane).open()
            run_id = await trained(client, 1)
            group.raise_in_tick = RuntimeError("bug")
            await client.failure(await client.submit(run_id, 3, pass_command("p")))
            return len(plane._books.watch._requests)

    assert run(program()) == 0


def test_lost_samples_are_forgotten_in_time() -> None:
    async def program() -> list[str]:
        watch = Watch(VirtualClock())
        watch.accepted("sample-1", TENANT, ("model", "base", None))
        watch.accepted("sample-2", TENANT, ("model", "base", None))
        watch.forget_stale(lambda request_id: False)
        assert len(watch._requests) == 2, "too early"
        await asyncio.sleep(4000)
        watch.forget_stale(lambda request_id: request_id == "sample-2")
        return sorted(watch._requests)

    assert run(program()) == ["sample-2"]


def test_the_summary_of_a_sample_is_what_was_drawn() -> None:
    sequence = SampledSequence(np.ones(3, np.int32), np.zeros(3, np.float32), "length")
    assert summary_of(SampleResult((sequence, sequence))) == {"sampled_tokens": 6.0}
    assert summary_of(None) == {}
    assert summary_of({"path": "tinker://x", "size_bytes": 3}) == {"size_bytes": 3.0}


def test_samplers_take_no_place_among_the_curves(tmp_path: Path) -> None:
    async def program() -> list[str]:
        async with control_plane(tmp_path) as plane:
            client = await Client(plane).open()
            run_id = await trained(client)
            sampler = (await client.do(run_id, 5, SnapshotCommand(1)))["sampling_session_id"]
            await client.result(await client.sample(sampler))
            return [owner.replace(client.session, "") for owner in plane._books.watch.histories._runs]

    assert run(program()) == [":train:0"]
