"""Copies, projects, search, bills and audit, read with the SDK's own models."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tinker.types import (
    AuditLogResponse,
    BillingUsageResponse,
    CurrentCheckpointStorageUsageResponse,
    SessionSearchResponse,
    TrainingRunsResponse,
)

from tests.gateway.world import API, Tenant, world
from twinkle_serve.gateway.management import _MAX_DAYS
from twinkle_serve.storage.keys import KeyStore


async def get(caller: Tenant, path: str, **query: Any) -> Any:
    answer = await caller.request("GET", f"{API}/{path}", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def copy(caller: Tenant, key: str = "", **body: Any) -> tuple[int, Any]:
    headers = {"X-Idempotency-Key": key} if key else {}
    answer = await caller.request("POST", f"{API}/copy_weights", json=body, headers=headers)
    return answer.status_code, answer.json()


async def test_a_copy_is_the_same_checkpoint_in_a_run_of_its_own(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        owner = await here.tenant("tml-owner").settle()
        source = owner.objects["checkpoint"]
        status, made = await copy(owner, "key-1", source_path=source, destination_project_id="archive")
        assert status == 200
        path = made["tinker_path"]
        assert path.endswith("/weights/a")
        assert path != source
        assert (await copy(owner, "key-1", source_path=source, destination_project_id="archive"))[1] == made
        again = await copy(owner, "key-2", source_path=source, destination_project_id="archive")
        assert again[1] != made
        run_id = path.split("/")[2]
        info = await get(owner, f"training_runs/{run_id}")
        assert info["lora_rank"] == 8
        runs = TrainingRunsResponse.model_validate(await get(owner, "training_runs", project_id="archive"))
        assert {run.training_run_id for run in runs.training_runs} == {
            run_id,
            again[1]["tinker_path"].split("/")[2],
        }
        # It stands on its own: the source may go, and it can be loaded but not trained.
        base = f"{API}/training_runs/{owner.objects['run']}/checkpoints/weights/a"
        assert (await owner.request("DELETE", base)).status_code == 204
        body = {"session_id": owner.objects["session"], "model_seq_id": 9, "path": path, "optimizer": False}
        files = await owner.request("GET", f"{API}/training_runs/{run_id}/checkpoints/weights/a/archive")
        assert files.status_code == 302
        assert (await owner.request("POST", f"{API}/load_weights", json=body)).status_code == 200
        trained = {"model_id": run_id, "seq_id": 1, "adam_params": {}}
        assert (await owner.request("POST", f"{API}/optim_step", json=trained)).status_code == 404


async def test_a_copy_may_be_made_into_a_session_and_of_what_others_published(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        owner = await here.tenant("tml-owner").settle()
        reader = await here.tenant("tml-reader").settle()
        source, session = owner.objects["checkpoint"], reader.objects["session"]
        place = {"session_id": session, "model_seq_id": 5}
        assert (await copy(reader, source_path=source, **place))[0] == 404
        run = f"{API}/training_runs/{owner.objects['run']}/checkpoints/weights/a"
        await owner.request("POST", f"{run}/publish")
        status, made = await copy(reader, source_path=source, ttl_seconds=3600, **place)
        assert (status, made["tinker_path"]) == (200, f"tinker://{session}:train:5/weights/a")
        assert await copy(reader, source_path=source, ttl_seconds=3600, **place) == (200, made), "sent twice"
        await owner.request("DELETE", f"{run}/publish")
        (found,) = (await get(reader, f"training_runs/{session}:train:5/checkpoints"))["checkpoints"]
        assert found["public"] is False
        assert found["expires_at"]
        # Onto itself: it is there. For another one the place is taken.
        await owner.request("POST", f"{run}/publish")
        own = reader.objects["checkpoint"]
        there = await copy(reader, source_path=own, session_id=session, model_seq_id=0)
        assert there == (200, {"tinker_path": own})
        for other, number in ((source, 0), (own, 5)):
            place["model_seq_id"] = number
            status, answer = await copy(reader, source_path=other, **place)
            assert status == 400, answer
            assert f"model_seq_id {number} of session {session!r} is taken" in answer["detail"]


@pytest.mark.parametrize(
    "body",
    [
        {"session_id": "s"},
        {"session_id": "s", "model_seq_id": 1, "destination_project_id": "p"},
        {"ttl_seconds": 5},
        {"destination_project_id": ""},
        {"source_path": "/etc/passwd"},
        {"source_path": "tinker://../weights/a"},
    ],
)
async def test_a_copy_that_makes_no_sense_is_refused(tmp_path: Path, body: dict[str, Any]) -> None:
    async with world(tmp_path) as here:
        owner = await here.tenant("tml-owner").settle()
        status, answer = await copy(owner, **{"source_path": owner.objects["checkpoint"], **body})
        assert status == 400, answer


async def test_a_copy_above_the_limit_is_to_be_tried_again(tmp_path: Path) -> None:
    async with world(tmp_path, limits={"tenant": {"checkpoint_bytes": 2**20}}) as here:
        owner = await here.tenant("tml-owner").settle()
        here.plane._books.checkpoints.sizes["x"] = 1
        here.plane._books.quotas._limits.tenant.checkpoint_bytes = 1
        status, answer = await copy(owner, source_path=owner.objects["checkpoint"])
        assert status == 429
        assert answer["queue_state"] == "paused_capacity"
        assert "delete some" in answer["queue_state_reason"]


async def search(caller: Tenant, **body: Any) -> SessionSearchResponse:
    return SessionSearchResponse.model_validate(await caller.post("sessions/search", body))


async def test_sessions_are_found_by_what_they_say_of_themselves(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        owner = here.tenant("tml-owner")
        await (await here.tenant("tml-stranger").settle()).post("create_session", {"display_name": "Run one"})
        ids = [
            (await owner.post("create_session", body))["session_id"]
            for body in (
                {"display_name": "Run one", "user_metadata": {"team": "a", "n": 1}},
                {"display_name": "second run", "project_id": "p"},
                {},
            )
        ]
        finish = {"reason": {"type": "errored"}, "detail": "KeyError"}
        await owner.request("POST", f"{API}/sessions/{ids[0]}/finish", json=finish)
        moved = await owner.request("PUT", f"{API}/sessions/{ids[2]}/project", json={"project_id": "q"})
        assert moved.status_code == 204

        async def found(**body: Any) -> list[int]:
            return [ids.index(session.session_id) for session in (await search(owner, **body)).sessions]

        assert await found() == [2, 1, 0]
        assert await found(display_name="RUN") == [1, 0]
        assert await found(display_name="one run") == [0]
        assert await found(session_id=ids[2], display_name="one") == [2, 0]
        assert await found(user_metadata={"team": "a", "n": "1"}) == [0]
        assert await found(user_metadata={"team": "b"}) == []
        assert await found(project_ids=["p", "q"]) == [2, 1]
        assert await found(statuses=[{"type": "active"}]) == [2, 1]
        assert await found(statuses=[{"type": "client_finished", "reasons": ["errored"]}]) == [0]
        assert await found(statuses=[{"type": "client_finished", "reasons": ["success"]}]) == []
        assert await found(owner={"type": "accessible"}) == [2, 1, 0]
        assert await found(owner={"type": "user", "owner_urns": ["somebody"]}) == []
        mine = (await search(owner)).sessions[0].owner
        assert await found(owner={"type": "user", "owner_urns": [mine]}) == [2, 1, 0]
        page, seen = await search(owner, limit=1), []
        while page.next_cursor is not None:
            seen += [session.session_id for session in page.sessions]
            page = await search(owner, limit=1, cursor=page.next_cursor.model_dump(mode="json"))
        assert seen + [session.session_id for session in page.sessions] == ids[::-1]
        first = (await search(owner, session_id=ids[0])).sessions[0]
        assert first.status is not None
        assert (first.status.type, first.project_id) == ("client_finished", "default")


async def test_a_bill_counts_what_was_done(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        owner = await here.tenant("tml-owner").settle()
        stranger = await here.tenant("tml-stranger").settle()
        books = here.plane._books
        books.watch.used(tenant_of(owner, here), owner.objects["session"], "base", "train", 6)
        books.watch.used(tenant_of(owner, here), owner.objects["session"], "base", "sampled", 4)
        start = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        window = {
            "starting_on": start.isoformat(),
            "ending_before": (start + timedelta(hours=2)).isoformat(),
        }
        bill = BillingUsageResponse.model_validate(await get(owner, "billing/usage/events", **window))
        events = {event.event_info.type: event for event in bill.data}
        assert events["training"].event_info.token_count == 6  # type: ignore[union-attr]
        assert events["sampling_sample"].event_info.token_count == 4  # type: ignore[union-attr]
        assert events["checkpoint"].event_info.count == 3  # type: ignore[union-attr]
        assert events["training"].session_id == owner.objects["session"]
        assert events["training"].base_model == "base"
        assert set(bill.sessions) == {owner.objects["session"]}
        theirs = BillingUsageResponse.model_validate(await get(stranger, "billing/usage/events", **window))
        assert {event.event_info.type for event in theirs.data} <= {"checkpoint", "storage"}
        storage = CurrentCheckpointStorageUsageResponse.model_validate(
            await get(owner, "billing/usage/checkpoints/current")
        )
        assert [(item.project_id, item.checkpoint_count) for item in storage.data] == [("default", 3)]
        assert (await get(owner, "billing/usage/checkpoints/current", project_id="p"))["data"] == []


def tenant_of(caller: Tenant, here: Any) -> str:
    return str(here.plane._books.sessions._sessions[caller.objects["session"]].record.tenant)


@pytest.mark.parametrize(
    "window",
    [
        ("2026-01-01T00:00:00Z", "2026-01-01T00:30:00Z"),
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z"),
        ("2026-01-01T00:00:00Z", f"2026-01-{_MAX_DAYS + 1:02d}T01:00:00Z"),
    ],
)
async def test_a_bill_is_for_whole_hours_of_two_weeks_at_most(
    tmp_path: Path, window: tuple[str, str]
) -> None:
    async with world(tmp_path) as here:
        query = dict(zip(("starting_on", "ending_before"), window, strict=True))
        answer = await here.tenant("tml-a").request("GET", f"{API}/billing/usage/events", params=query)
        assert answer.status_code == 400


async def test_the_audit_log_says_what_was_done_to_checkpoints(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        owner = await here.tenant("tml-owner").settle()
        reader = await here.tenant("tml-reader").settle()
        base = f"{API}/training_runs/{owner.objects['run']}/checkpoints/weights/a"
        await owner.request("POST", f"{base}/publish")
        await reader.request("GET", f"{base}/external_weights_urls")
        await owner.request("DELETE", base)
        log = AuditLogResponse.model_validate(await get(owner, "audit", event_type="all"))
        mine = [e for e in log.entries if e.event_details["tinker_path"] == owner.objects["checkpoint"]]
        assert [entry.event for entry in mine] == [
            "checkpoint_created",
            "checkpoint_published",
            "checkpoint_read",
            "checkpoint_deleted",
        ]
        assert mine[2].event_details["by"] == "another tenant"
        day = datetime.now(UTC).date()
        assert await get(owner, "audit", event_type="checkpoint_read", day=day.isoformat())
        before = await get(owner, "audit", event_type="all", day=(day - timedelta(days=1)).isoformat())
        assert before == {"entries": []}


async def test_a_key_takes_itself_back(tmp_path: Path) -> None:
    async with world(tmp_path, auth={"mode": "keys"}) as here:
        store = KeyStore(tmp_path)
        caller = here.tenant(store.create("alice"))
        assert (await get(caller, "auth/apikey/me"))["name"] == "alice"
        assert (await caller.request("DELETE", f"{API}/auth/apikey/me")).status_code == 204
        assert (await caller.request("GET", f"{API}/auth/apikey/me")).status_code == 401
        assert store.list()[0].revoked_at
        store.close()
    async with world(tmp_path) as here:
        answer = await here.tenant("tml-a").request("DELETE", f"{API}/auth/apikey/me")
        assert answer.status_code == 400
