"""Keys that are asked about: how often, how long an answer counts, and what a failure to ask means."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from twinkle_serve.config import Config
from twinkle_serve.gateway import identity as identity_module
from twinkle_serve.gateway.identity import (
    Caller,
    CheckedIdentity,
    check_modelscope_token,
    create_identity,
)
from twinkle_serve.hub.users import HubAway
from twinkle_serve.protocol.errors import BackendUnavailable, Unauthorized
from twinkle_serve.storage.keys import KeyStore


class Desk:
    """Who is asked, and a clock."""

    def __init__(self) -> None:
        self.callers: dict[str, Caller] = {"tml-a": Caller("tenant-a", "a")}
        self.asked: list[str] = []
        self.away = False
        self.now = 0.0
        self.gate = threading.Event()
        self.gate.set()

    def check(self, key: str) -> Caller | None:
        self.asked.append(key)
        self.gate.wait()
        if self.away:
            raise BackendUnavailable("away")
        return self.callers.get(key)

    def identity(self, grace_s: float = 0.0) -> CheckedIdentity:
        return CheckedIdentity(self.check, good_s=20, bad_s=5, grace_s=grace_s, now=lambda: self.now)


async def test_a_good_key_is_asked_about_once_in_a_while() -> None:
    desk = Desk()
    identity = desk.identity()
    for now in (0.0, 10.0, 20.0):
        desk.now = now
        assert (await identity.identify({"x-api-key": "tml-a"})).tenant == "tenant-a"
    assert desk.asked == ["tml-a"]
    desk.now = 20.1
    del desk.callers["tml-a"]
    with pytest.raises(Unauthorized):
        await identity.identify({"x-api-key": "tml-a"})


async def test_a_bad_key_is_asked_about_again_sooner() -> None:
    desk = Desk()
    identity = desk.identity()
    for now in (0.0, 4.0):
        desk.now = now
        with pytest.raises(Unauthorized):
            await identity.identify({"x-api-key": "tml-b"})
    assert desk.asked == ["tml-b"]
    desk.now, desk.callers["tml-b"] = 5.1, Caller("tenant-b", "b")
    assert (await identity.identify({"x-api-key": "tml-b"})).tenant == "tenant-b"


async def test_many_requests_with_one_key_ask_once() -> None:
    desk = Desk()
    desk.gate.clear()
    identity = desk.identity()
    waiting = [asyncio.create_task(identity.identify({"x-api-key": "tml-a"})) for _ in range(50)]
    await asyncio.sleep(0)
    desk.gate.set()
    assert {caller.tenant for caller in await asyncio.gather(*waiting)} == {"tenant-a"}
    assert desk.asked == ["tml-a"]


async def test_a_good_key_goes_on_for_a_while_when_nobody_can_be_asked() -> None:
    desk = Desk()
    identity = desk.identity(grace_s=100)
    await identity.identify({"x-api-key": "tml-a"})
    desk.away, desk.now = True, 90.0
    assert (await identity.identify({"x-api-key": "tml-a"})).tenant == "tenant-a"
    desk.now = 101.0
    with pytest.raises(BackendUnavailable):
        await identity.identify({"x-api-key": "tml-a"})
    with pytest.raises(BackendUnavailable):
        await identity.identify({"x-api-key": "tml-new"})


async def test_a_good_key_does_not_wait_for_an_answer_that_does_not_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk()
    identity = desk.identity(grace_s=100)
    await identity.identify({"x-api-key": "tml-a"})
    desk.now = 30.0
    desk.gate.clear()
    try:
        monkeypatch.setattr(identity_module, "_PATIENCE_S", 0.01)
        async with asyncio.timeout(20):
            assert (await identity.identify({"x-api-key": "tml-a"})).tenant == "tenant-a"
        monkeypatch.setattr(identity_module, "_PATIENCE_S", 1e9)
        desk.now = 44.9
        async with asyncio.timeout(20):
            assert (await identity.identify({"x-api-key": "tml-a"})).tenant == "tenant-a"
        assert desk.asked == ["tml-a", "tml-a"]
    finally:
        desk.gate.set()


async def test_a_late_answer_counts() -> None:
    desk = Desk()
    identity = desk.identity(grace_s=100)
    await identity.identify({"x-api-key": "tml-a"})
    desk.away, desk.now = True, 30.0
    await identity.identify({"x-api-key": "tml-a"})
    desk.away, desk.now = False, 44.0
    del desk.callers["tml-a"]
    assert (await identity.identify({"x-api-key": "tml-a"})).tenant == "tenant-a", "not asked again yet"
    desk.now = 45.1
    with pytest.raises(Unauthorized):
        await identity.identify({"x-api-key": "tml-a"})


async def test_made_up_keys_do_not_get_in_the_way_of_a_good_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity_module, "_MAX_STRANGE", 50)
    desk, gate = Desk(), threading.Event()

    def check(key: str) -> Caller | None:
        if key == "tml-a":
            return desk.check(key)
        gate.wait()
        return None

    identity = CheckedIdentity(check, good_s=20, now=lambda: desk.now)
    await identity.identify({"x-api-key": "tml-a"})
    desk.now = 30.0
    flood = [asyncio.create_task(identity.identify({"x-api-key": f"tml-{i}"})) for i in range(1000)]
    try:
        async with asyncio.timeout(20):
            assert (await identity.identify({"x-api-key": "tml-a"})).tenant == "tenant-a"
        assert desk.asked == ["tml-a", "tml-a"]
    finally:
        gate.set()
    ends = await asyncio.gather(*flood, return_exceptions=True)
    assert [type(end) for end in ends] == [Unauthorized] * 50 + [BackendUnavailable] * 950
    with pytest.raises(Unauthorized):
        await identity.identify({"x-api-key": "tml-999"})


async def test_made_up_keys_do_not_push_a_good_one_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity_module, "_MAX_REMEMBERED", 5)
    desk = Desk()
    identity = desk.identity()
    await identity.identify({"x-api-key": "tml-a"})
    for i in range(10):
        with pytest.raises(Unauthorized):
            await identity.identify({"x-api-key": f"tml-{i}"})
    await identity.identify({"x-api-key": "tml-a"})
    assert desk.asked.count("tml-a") == 1


async def test_no_key_is_nobody() -> None:
    with pytest.raises(Unauthorized, match="no API key"):
        await Desk().identity().identify({})


def test_a_modelscope_token_comes_bare_or_behind_the_prefix() -> None:
    class Users:
        def user_of(self, token: str) -> str | None:
            if token == "ms-away":
                raise HubAway
            assert token.isascii(), "nothing else fits a header"
            return {"ms-alice": "alice"}.get(token)

    check = check_modelscope_token(Users())  # type: ignore[arg-type]
    bare, prefixed = check("ms-alice"), check("tml-ms-alice")
    assert bare == prefixed
    assert bare is not None
    assert bare.name == "alice"
    assert "alice" not in bare.tenant
    assert check("tml-") is None
    assert check("ms-bob") is None
    assert check("tml-密钥") is None
    assert check("ms-a\nb") is None
    with pytest.raises(BackendUnavailable, match="ModelScope"):
        check("ms-away")


async def test_mode_keys_lets_in_whom_the_operator_gave_a_key(tmp_path: Path) -> None:
    model = {"name": "m", "path": "nowhere"}
    tree = {"models": [model], "auth": {"mode": "keys"}, "storage": {"root": str(tmp_path)}}
    identity = create_identity(Config.model_validate(tree))
    store = KeyStore(tmp_path)
    key = store.create("alice")
    store.close()
    assert (await identity.identify({"authorization": f"Bearer {key}"})).name == "alice"
    with pytest.raises(Unauthorized):
        await identity.identify({"x-api-key": "tml-local"})


def test_mode_modelscope_needs_a_gate() -> None:
    with pytest.raises(ValueError, match="marker_repo or"):
        Config.model_validate({"models": [{"name": "m", "path": "p"}], "auth": {"mode": "modelscope"}})
