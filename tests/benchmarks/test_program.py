from __future__ import annotations

import json
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from benchmarks.clients import ClientError, clients_of
from benchmarks.program import built, together, train


class FakeTenant:
    """Writes down what was sent and awaited, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.rates: set[float] = set()
        self._sent: Counter[str] = Counter()

    def forward_backward(self, tokens: int, datum: int):
        return self._send("f")

    def optim_step(self, learning_rate: float):
        self.rates.add(learning_rate)
        return self._send("o")

    def _send(self, what: str):
        self._sent[what] += 1
        name = f"{what}{self._sent[what]}"
        self.events.append(name)

        def result(timeout: float):
            self.events.append(name.upper())
            return SimpleNamespace(metrics={"loss:sum": 3.5})

        return SimpleNamespace(result=result)


def steps(depth: int, count: int = 3) -> tuple[FakeTenant, dict]:
    tenant = FakeTenant()
    order = {"tokens": 64, "depth": depth, "steps": count, "learning_rate": 0.5}
    return tenant, train(tenant, order, time.perf_counter())


def test_depth_0_awaits_each_operation():
    tenant, found = steps(0, 2)
    # The pass is awaited once for itself, and once more as a part of its step.
    assert tenant.events == ["f1", "F1", "o1", "F1", "O1", "f2", "F2", "o2", "F2", "O2"]
    assert len(found["forward_backward"]) == len(found["optim_step"]) == len(found["step"]) == 2


def test_depth_1_sends_both_halves_first():
    tenant, found = steps(1, 2)
    assert tenant.events == ["f1", "o1", "F1", "O1", "f2", "o2", "F2", "O2"]
    assert found["forward_backward"] == []


def test_depth_2_keeps_two_steps_in_flight_and_lands_all():
    tenant, found = steps(2)
    assert tenant.events == ["f1", "o1", "f2", "o2", "F1", "O1", "f3", "o3", "F2", "O2", "F3", "O3"]
    assert found["steps"] == len(found["step"]) == len(found["ends"]) == 3
    assert found["loss"] == 3.5
    assert tenant.rates == {0.5}
    assert found["ends"] == sorted(found["ends"])


def test_a_time_limit_ends_the_steps():
    tenant = FakeTenant()
    found = train(tenant, {"tokens": 64, "depth": 1, "seconds": -1.0}, time.perf_counter())
    assert found["steps"] == 0
    assert tenant.events == []


def test_together_runs_all_and_tells_the_first_error():
    assert together([lambda n=n: n * n for n in range(5)]) == [0, 1, 4, 9, 16]
    with pytest.raises(ZeroDivisionError):
        together([lambda: 1, lambda: 1 / 0])


def test_a_client_is_built_whatever_the_sdk_returns():
    assert built("client") == "client"
    assert built(SimpleNamespace(result=lambda: "client")) == "client"


@pytest.fixture
def program(tmp_path, monkeypatch):
    def put(body: str):
        path = tmp_path / "program.py"
        path.write_text(f"import json, sys\n{body}\n")
        monkeypatch.setattr("benchmarks.clients.PROGRAM", path)
        return clients_of("http://127.0.0.1:9", "m", log=tmp_path / "log", python=sys.executable)

    return put


def test_orders_and_answers_are_lines_of_json(program):
    echo = "for line in sys.stdin: print(json.dumps({'create_s': [json.loads(line)]}), flush=True)"
    with program(echo) as clients:
        assert clients.open(2, rank=4) == [{"do": "open", "tenants": 2, "rank": 4}]
        assert clients.more(range(2), 3) == [{"do": "more", "tenants": [0, 1], "count": 3}]
        answer = clients.train([0], tokens=64, depth=1, steps=5)
        assert json.dumps(answer["create_s"][0]["steps"]) == "5"


def test_a_failed_order_and_a_dead_program_are_errors(program):
    with (
        program(
            "sys.stdin.readline(); print('{\"error\": \"no room\"}', flush=True); sys.exit('gone')"
        ) as clients,
        pytest.raises(ClientError, match="open: no room"),
    ):
        clients.open(1)
    with program("sys.exit('out of paper')") as clients, pytest.raises(ClientError, match="out of paper"):
        clients.open(1)
