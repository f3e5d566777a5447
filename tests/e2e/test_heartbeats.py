"""The helper that measures heartbeats: a stall of the server counts for every one that was due in it."""

from __future__ import annotations

import asyncio
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import pytest

from tests.e2e.heartbeats import PERIOD_S, beat_until
from tests.e2e.test_sampling_load import heartbeats

NUM_STALLED = 5


@pytest.mark.timeout(60)
async def test_heartbeats_do_not_wait_for_each_other() -> None:
    over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stall = asyncio.Event()
    sent = 0

    async def beat() -> None:
        nonlocal sent
        sent += 1
        if sent == NUM_STALLED:
            over.set_result("")
            stall.set()
        await stall.wait()

    latencies = await beat_until(over, beat)
    assert len(latencies) == NUM_STALLED
    # Lower bounds only, which no slow machine breaks: each waited at least for those due after it.
    for later, latency in enumerate(sorted(latencies)):
        assert latency >= later * PERIOD_S - 1e-6


async def test_a_heartbeat_that_fails_ends_them_all() -> None:
    over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def beat() -> None:
        raise ConnectionError("gone")

    with pytest.raises(ExceptionGroup, match="unhandled") as found:
        await beat_until(over, beat)
    assert isinstance(found.value.exceptions[0], ConnectionError)


class StallingServer(BaseHTTPRequestHandler):
    """Answers no heartbeat before NUM_STALLED of them are there."""

    protocol_version = "HTTP/1.1"
    stalled = 0
    enough = Event()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/session_heartbeat"):
            assert self.headers["X-API-Key"]
            StallingServer.stalled += 1
            if StallingServer.stalled == NUM_STALLED:
                StallingServer.enough.set()
            StallingServer.enough.wait()
        answer = json.dumps({"session_id": "session-1"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


def test_the_program_beats_over_http_until_its_input_ends() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), StallingServer) as server:
        serving = Thread(target=server.serve_forever)
        serving.start()
        with heartbeats(f"http://127.0.0.1:{server.server_port}") as latencies:
            all_came = StallingServer.enough.wait(30)
            StallingServer.enough.set()
        server.shutdown()
        serving.join()
    assert all_came, "one waited for another's answer"
    assert len(latencies) >= NUM_STALLED
    assert latencies == sorted(latencies)
    assert latencies[-1] >= (NUM_STALLED - 1) * PERIOD_S
