"""Uploaded losses that mean harm, over HTTP against a real server: each gets an error that names what is
wrong, and neither the ranks' processes nor their memory nor another run's numbers show that it was there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from twinkle_serve.cluster.private_ray import descendants
from twinkle_serve.testing.server import RunningServer

pytestmark = pytest.mark.slow
TOKENS = list(range(5, 13))
MEMORY_BYTES = 200 * 2**20
Json = dict[str, Any]


def node(op: str, name: str, target: str, *args: Any, **kwargs: Any) -> Json:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


def call(name: str, target: str, *args: Any, **kwargs: Any) -> Json:
    return node("call_function", name, target, *args, **kwargs)


def method(name: str, target: str, *args: Any, **kwargs: Any) -> Json:
    return node("call_method", name, target, *args, **kwargs)


def ref(name: str) -> Json:
    return {"ref": name}


X = ref("x")
INT64 = {"dtype": "int64"}
HUGE = call("huge", "torch.full", [], 2**40, dtype=INT64)
SMALLEST = [
    call("power", "torch.full", [9], -(2**53), dtype=INT64),
    call("smallest", "operator.mul", ref("power"), 2**10),
]
WIDE = method("wide", "view", ref("nothing"), 2**40, 0)
NOTHING = call("nothing", "operator.getitem", X, {"slice": [0, 0, None]})

UPLOADS: list[tuple[list[Json], str]] = [
    # Attributes and names that lead elsewhere.
    ([call("out", "getattr", X, "__class__")], "only these attributes"),
    ([call("out", "builtins.getattr", X, "grad_fn")], "only these attributes"),
    ([method("out", "__reduce_ex__", X, 2)], "'__reduce_ex__' is not served"),
    ([method("out", "register_hook", X, X)], "'register_hook' is not served"),
    ([call("out", "torch.Tensor.exp.__globals__", X)], "is not served"),
    ([call("out", "torch.utils.data.get_worker_info")], "is not served"),
    ([call("out", "os.system", "touch /tmp/owned")], "'os.system' is not served"),
    ([call("out", "torch.load", "/etc/passwd")], "'torch.load' is not served"),
    ([node("call_module", "out", "linear", X)], "'call_module' is not served"),
    ([node("get_attr", "out", "weight")], "'get_attr' is not served"),
    ([method("out", "exp_", X)], "'exp_' is not served"),
    ([call("out", "torch.nn.functional.relu", X, inplace=True)], "in place"),
    ([call("out", "torch.rand_like", X)], "'torch.rand_like' is not served"),
    # Sizes.
    ([call("out", "torch.zeros", 2**40)], "elements"),
    ([call("out", "torch.ones", [2**20, 2**20])], "elements"),
    ([method("out", "expand", X, 2**40, -1)], "elements"),
    ([method("out", "repeat", X, 2**53)], "elements"),
    ([call("out", "torch.arange", 0, 1, 1e-300)], "over 2^53 elements"),
    ([HUGE, call("out", "torch.arange", ref("huge"))], "plain numbers"),
    ([HUGE, call("out", "operator.mul", [1, 2, 3], ref("huge"))], "tensors or numbers"),
    ([call("out", "torch.zeros", 2**40, 0)], "elements"),
    ([NOTHING, WIDE, method("out", "sum", ref("wide"), 1)], "elements"),
    ([call("out", "torch.zeros", -4)], "negative"),
    ([method("out", "view", X, -3)], "invalid shape dimension -3"),
    ([method("out", "narrow", X, 0, -(2**53), 2**53)], "out of range"),
    ([call("out", "torch.zeros", 2**60)], "beyond 2^53"),
    ([call("out", "torch.zeros", "4")], "the text '4'"),
    ([call("out", "torch.zeros", 4.5)], "whole numbers"),
    ([call("out", "torch.diff", X, 2**50, -1, X, X)], "must return a scalar"),
    ([*SMALLEST, call("out", "torch.div", ref("smallest"), -1, rounding_mode="trunc")], "'floor'"),
    ([method("r", "repeat", X, 3000), call("out", "torch.argsort", ref("r"))], "elements"),
    # Shape and length of the graph itself.
    ([call("out", "torch.exp", [[[[[[[[[[1]]]]]]]]]])], "nested deeper"),
    ([call("out", "torch.exp", ref("later"))], "no earlier node"),
    ([method(f"n{i}", "exp", X) for i in range(600)], "at most 512"),
    ([method("unused", "exp", X)], "no earlier node"),
    # Values that are no loss.
    ([call("out", "torch.outer", X, X)], "must return a scalar"),
    ([call("out", "torch.mm", X, X)], "must be a matrix"),
    ([call("out", "torch.full", [], 1.0)], "does not depend on logprobs"),
    ([call("fl", "torch.floor_divide", X, 2.0), method("out", "sum", ref("fl"))], "has no gradient"),
    ([call("out", "operator.pow", 2**53, 64)], "2^53"),
    ([call("out", "operator.pow", -2, 0.5)], "gives a complex"),
]  # fmt: skip

LARGE = method("large", "mul", X, -1e30)
MANY = call("many", "torch.ones", 40_000)
ON_DATA: list[tuple[list[Json], str]] = [
    ([call("i", "operator.getitem", X, 20), method("out", "square", ref("i"))], "index 20 is out of bounds"),
    ([method("l", "log", X), method("out", "sum", ref("l"))], "not finite"),
    ([LARGE, call("e", "torch.exp", ref("large")), method("out", "sum", ref("e"))], "not finite"),
    (
        [
            MANY,
            method("s", "sum", ref("many")),
            method("t", "sum", X),
            call("out", "operator.add", ref("s"), ref("t")),
        ],
        "40000 elements",
    ),
]


class Client:
    """A session with a run, over plain HTTP."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        self.session = http.post("/create_session", json={}).json()["session_id"]
        lora = {"rank": 4, "seed": 1}
        body = {"session_id": self.session, "model_seq_id": 0, "base_model": "llama", "lora_config": lora}
        self.run = self.result(http.post("/create_model", json=body))["model_id"]
        self.num_losses = self.seq_id = 0

    def result(self, answer: httpx.Response) -> Json:
        assert answer.status_code == 200, answer.text
        promise = answer.json()
        while (poll := self.http.post("/retrieve_future", json=promise)).status_code == 408:
            pass
        assert poll.status_code == 200, poll.text
        found: Json = poll.json()
        return found

    def upload(self, nodes: list[Json]) -> Json:
        self.num_losses += 1
        placeholder = node("placeholder", "x", "logprobs")
        output = node("output", "output", "output", {"tuple": [ref("out"), {"dict": {}}]})
        body = {
            "session_id": self.session,
            "custom_loss_seq_id": self.num_losses,
            "name": "mine",
            "inputs": [{"name": "logprobs", "rank": 1}],
            "graph": {"format": 1, "nodes": [placeholder, *nodes, output]},
        }
        return self.result(self.http.post("/create_custom_loss", json=body))

    def train(self, loss_fn: str, **config: str) -> Json:
        targets = {"data": TOKENS[1:], "dtype": "int64", "shape": [len(TOKENS) - 1]}
        chunk = {"type": "encoded_text", "tokens": TOKENS[:-1]}
        data = [{"model_input": {"chunks": [chunk]}, "loss_fn_inputs": {"target_tokens": targets}}]
        inner = {"data": data, "loss_fn": loss_fn, "loss_fn_config": config}
        return self._send("/forward_backward", {"forward_backward_input": inner})

    def step(self) -> Json:
        return self._send("/optim_step", {"adam_params": {"learning_rate": 1e-2}})

    def _send(self, path: str, body: Json) -> Json:
        self.seq_id += 1
        return self.result(self.http.post(path, json=body | {"model_id": self.run, "seq_id": self.seq_id}))


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    headers = {"X-API-Key": "tml-hostile"}
    with httpx.Client(base_url=f"{server.url}/api/v1", headers=headers, timeout=120, trust_env=False) as http:
        yield Client(http)


def ranks(server: RunningServer) -> dict[int, int]:
    """Resident bytes of each rank's process, by pid."""
    found = {}
    for pid in descendants(server.pid):
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
        if b"ray::rank " in title or b"ray::RankWorker" in title:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            found[pid] = pages * 4096
    return found


def learnt(client: Client) -> list[Any]:
    """Two steps of an honest tenant, from the beginning."""
    fresh = Client(client.http)
    seen = []
    for _ in range(2):
        seen.append(fresh.train("cross_entropy")["metrics"])
        fresh.step()
    return [*seen, fresh.train("cross_entropy")["loss_fn_outputs"]]


def test_they_are_refused_by_name_and_leave_no_trace(server: RunningServer, client: Client) -> None:
    before, expected = ranks(server), learnt(client)
    assert before
    for nodes, words in UPLOADS:
        answer = client.upload(nodes)
        assert answer.get("category") == "user", (nodes, answer)
        assert words in answer["error"], (nodes, answer)
        assert len(answer["error"]) < 1000
    after = ranks(server)
    assert after.keys() == before.keys(), "a rank died"
    for pid, size in after.items():
        assert size - before[pid] < MEMORY_BYTES
    assert learnt(client) == expected
    assert not Path("/tmp/owned").exists()


def test_what_only_data_shows_fails_that_request_alone(server: RunningServer, client: Client) -> None:
    """Nothing of it is accumulated: the honest pass before it, and the step after it, are as if alone."""
    before = ranks(server)
    alone = Client(client.http)
    metrics = [each.train("cross_entropy")["metrics"] for each in (alone, client)]
    assert metrics[0] == metrics[1]
    for nodes, words in ON_DATA:
        loss_id = client.upload(nodes)["loss_id"]
        answer = client.train("custom", loss_id=loss_id)
        assert answer.get("category") == "user", (nodes, answer)
        assert words in answer["error"], (nodes, answer)
    for each in (alone, client):
        each.step()
    assert alone.train("cross_entropy")["loss_fn_outputs"] == client.train("cross_entropy")["loss_fn_outputs"]
    assert ranks(server).keys() == before.keys(), "a rank died"
