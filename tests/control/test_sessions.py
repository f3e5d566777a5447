from __future__ import annotations

import pytest

from twinkle_serve.control.backend import Invalid, NotFound
from twinkle_serve.control.sessions import Sessions
from twinkle_serve.storage.records import SessionRecord

EXPIRY_S = 600.0


@pytest.fixture
def saved() -> list[SessionRecord]:
    return []


@pytest.fixture
def sessions(saved) -> Sessions:
    return Sessions(EXPIRY_S, saved.append)


def test_ids_cannot_be_guessed(sessions):
    ids = {sessions.create("alice", {}, 0.0) for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(session_id) >= len("session-") + 22 and "/" not in session_id for session_id in ids)


def test_a_session_is_its_tenants(sessions):
    session_id = sessions.create("alice", {"tags": ["x"]}, 1.0)
    record = sessions.get("alice", session_id).record
    assert (record.tenant, record.created_at, record.info) == ("alice", 1.0, {"tags": ["x"]})
    for call in (sessions.get, lambda t, s: sessions.heartbeat(t, s, 0.0)):
        with pytest.raises(NotFound):
            call("bob", session_id)


def test_silence_expires_a_session_and_a_heartbeat_brings_it_back(sessions, saved):
    quiet = sessions.create("alice", {}, 0.0)
    lively = sessions.create("alice", {}, 0.0)
    sessions.heartbeat("alice", lively, 300.0)
    assert list(sessions.expire(EXPIRY_S - 1)) == []
    assert list(sessions.expire(EXPIRY_S)) == [quiet]
    assert list(sessions.expire(EXPIRY_S)) == []
    assert saved[-1].status == "expired"
    assert sessions.heartbeat("alice", quiet, 5000.0)
    assert saved[-1].status == "active"
    assert list(sessions.expire(5000.0)) == [lively]
    assert list(sessions.expire(5000.0 + EXPIRY_S)) == [quiet]


def test_use_is_a_sign_of_life(sessions):
    session_id = sessions.create("alice", {}, 0.0)
    sessions.usable("alice", session_id, 500.0)
    assert list(sessions.expire(EXPIRY_S)) == []


def test_the_first_reason_to_finish_stands(sessions, saved):
    session_id = sessions.create("alice", {}, 0.0)
    assert sessions.finish("alice", session_id, {"type": "success"})
    assert not sessions.finish("alice", session_id, {"type": "errored"})
    assert saved[-1].finish_reason == {"type": "success"}
    assert not sessions.heartbeat("alice", session_id, 1.0)
    with pytest.raises(Invalid):
        sessions.usable("alice", session_id, 1.0)
    assert list(sessions.expire(1e9)) == []


def test_listing_is_by_tenant_newest_first(sessions):
    ids = [sessions.create("alice", {}, float(n)) for n in range(5)]
    sessions.create("bob", {}, 9.0)
    assert sessions.list("alice", 2, 1) == [ids[3], ids[2]]
    assert sessions.list("carol", 10, 0) == []


def test_restored_sessions_keep_their_status_and_get_time_to_call(sessions, saved):
    for status in ("active", "finished", "expired"):
        sessions.restore(SessionRecord(status, "alice", 0.0, {}, status), 1000.0)
    assert saved == []
    assert list(sessions.expire(1000.0 + EXPIRY_S - 1)) == []
    assert list(sessions.expire(1000.0 + EXPIRY_S)) == ["active"]
    assert not sessions.heartbeat("alice", "finished", 0.0)


def test_a_session_whose_end_cannot_be_saved_goes_on_until_it_can(sessions, monkeypatch):
    ids = [sessions.create("alice", {}, 0.0) for _ in range(3)]
    save = sessions._save
    monkeypatch.setattr(
        sessions, "_save", lambda record: save(record) if record.session_id == ids[0] else 1 / 0
    )
    expiring = sessions.expire(EXPIRY_S)
    assert next(expiring) == ids[0], "what was saved is told"
    for attempt in (lambda: next(expiring), lambda: sessions.finish("alice", ids[2], {})):
        with pytest.raises(ZeroDivisionError):
            attempt()
    assert [sessions.is_active(each) for each in ids] == [False, True, True]
    assert {sessions.get("alice", each).record.status for each in ids[1:]} == {"active"}
    monkeypatch.undo()
    assert list(sessions.expire(EXPIRY_S)) == ids[1:]
