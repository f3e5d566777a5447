"""Who waits at the proxy's door, and who does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from twinkle_serve.cluster import proxy_hook, proxy_lanes
from twinkle_serve.cluster.proxy_lanes import WIDTH, Lanes


async def empty() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


def body_of(*pieces: bytes) -> asyncio.Queue[dict[str, Any]]:
    """A body that has come in so far; its end is the empty piece."""
    queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    for piece in pieces:
        queue.put_nowait({"type": "http.request", "body": piece, "more_body": bool(piece)})
    return queue


async def parts(receive: Any) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        yield message["body"]
        if not message["more_body"]:
            return


class Inside:
    """An application whose requests stay until they are let out. entered: their paths, in order."""

    def __init__(self) -> None:
        self.entered: list[str] = []
        self.bodies: list[bytes] = []
        self.out = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: object) -> None:
        self.bodies.append(b"".join([part async for part in parts(receive)]))
        self.entered.append(scope["path"])
        await self.out.wait()
        if scope["path"].endswith("broken/asample"):
            raise RuntimeError("planted")


@pytest.fixture
def inside() -> Inside:
    return Inside()


@pytest.fixture
def ask(inside: Inside) -> Callable[[str], asyncio.Task[None]]:
    door = Lanes(inside)

    def start(path: str, receive: Any = empty) -> asyncio.Task[None]:
        return asyncio.ensure_future(door({"type": "http", "path": path}, receive, None))

    return start


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_crowd_waits_and_a_heartbeat_passes_it(
    inside: Inside, ask: Callable[[str], asyncio.Task[None]]
) -> None:
    crowd = [ask(f"/prefix/api/v1/{number}/asample") for number in range(3 * WIDTH)]
    await settle()
    assert len(inside.entered) == WIDTH
    beat = ask("/prefix/api/v1/session_heartbeat")
    await settle()
    assert inside.entered[WIDTH:] == ["/prefix/api/v1/session_heartbeat"]
    inside.out.set()
    await asyncio.gather(*crowd, beat)
    in_order = [path for path in inside.entered if path.endswith("asample")]
    assert in_order == [f"/prefix/api/v1/{number}/asample" for number in range(3 * WIDTH)]


async def test_held_polls_take_no_room(
    inside: Inside, ask: Callable[[str], asyncio.Task[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_lanes, "_HELD_AFTER", 0.0)
    polls = [ask("/api/v1/retrieve_future") for _ in range(4 * WIDTH)]
    while len(inside.entered) < len(polls):
        await asyncio.sleep(0)
    samples = [ask("/api/v1/asample") for _ in range(WIDTH + 1)]
    await settle()
    assert len(inside.entered) == 4 * WIDTH + WIDTH
    inside.out.set()
    await asyncio.gather(*polls, *samples)


async def test_a_place_is_given_back_once_however_a_request_ends(
    inside: Inside, ask: Callable[[str], asyncio.Task[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_lanes, "_HELD_AFTER", 0.0)
    gone = [ask("/api/v1/asample") for _ in range(3)]
    polls = [ask("/api/v1/retrieve_futures") for _ in range(3)]
    waiting = [ask("/api/v1/asample") for _ in range(2 * WIDTH)]
    await settle()
    for task in (*gone, waiting.pop()):
        task.cancel()
    inside.out.set()
    broken = [ask("/api/v1/broken/asample") for _ in range(3)]
    ends = await asyncio.gather(*gone, *polls, *waiting, *broken, return_exceptions=True)
    assert sum(isinstance(end, RuntimeError) for end in ends) == 3
    inside.out.clear()
    inside.entered.clear()
    again = [ask("/api/v1/asample") for _ in range(WIDTH + 1)]
    await settle()
    assert len(inside.entered) == WIDTH
    inside.out.set()
    await asyncio.gather(*again)


async def test_who_sends_slowly_keeps_no_place(
    inside: Inside, ask: Callable[..., asyncio.Task[None]]
) -> None:
    inside.out.set()
    slow = [body_of(b"slow ") for _ in range(2 * WIDTH)]
    waiting = [ask("/api/v1/asample", queue.get) for queue in slow]
    await settle()
    await ask("/api/v1/asample")
    assert inside.bodies == [b""]
    for queue in slow:
        queue.put_nowait({"type": "http.request", "body": b"end", "more_body": False})
    await asyncio.gather(*waiting)
    assert inside.bodies[1:] == [b"slow end"] * len(slow)


async def test_a_large_body_is_not_held_at_the_door(
    inside: Inside, ask: Callable[..., asyncio.Task[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_lanes, "_MOST_READ", 4)
    inside.out.set()
    body = body_of(b"ab", b"cd", b"ef", b"")
    await ask("/api/v1/asample", body.get)
    assert inside.bodies == [b"abcdef"]
    gone = body_of()
    gone.put_nowait({"type": "http.disconnect"})
    with pytest.raises(KeyError, match="body"):
        await ask("/api/v1/asample", gone.get)


async def test_nobody_keeps_a_place_for_ever(
    inside: Inside, ask: Callable[..., asyncio.Task[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_lanes, "_LONGEST_S", 0.0)
    stuck = [ask("/api/v1/asample") for _ in range(3 * WIDTH)]
    while len(inside.entered) < len(stuck):
        await asyncio.sleep(0)
    inside.out.set()
    await asyncio.gather(*stuck)


async def test_a_poll_is_taken_for_held_later_where_submissions_take_longer(
    inside: Inside, ask: Callable[[str], asyncio.Task[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    now = [100.0]
    delays: list[float] = []
    monkeypatch.setattr(loop, "time", lambda: now[0])
    monkeypatch.setattr(loop, "call_later", lambda delay, callback: delays.append(delay))
    inside.out.set()
    await ask("/api/v1/retrieve_future")
    inside.out.clear()
    slow = ask("/api/v1/asample")
    await settle()
    now[0] += 1.0
    inside.out.set()
    await slow
    await ask("/api/v1/retrieve_future")
    assert delays[-1] > 3 * delays[0]


def test_serve_s_proxy_has_them_and_the_other_hook_sees_what_they_let_through() -> None:
    assert [middleware.cls for middleware in proxy_hook.middlewares()] == [Lanes, proxy_hook.TryAgain]
