"""Heartbeats of one session until standard input ends: ``python heartbeats.py URL KEY``.

Prints a JSON list of the seconds that each took. A process of its own, because a client that is busy with
hundreds of samples would measure itself.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import httpx


def main(url: str, key: str) -> list[float]:
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    latencies = []
    with httpx.Client(base_url=url, headers={"X-API-Key": key}, timeout=60) as http:
        session = http.post("/api/v1/create_session", json={"tags": []}).json()["session_id"]
        print("beating", flush=True)
        while not over.is_set():
            began = time.perf_counter()
            http.post("/api/v1/session_heartbeat", json={"session_id": session}).raise_for_status()
            latencies.append(time.perf_counter() - began)
            time.sleep(0.05)
    return latencies


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
