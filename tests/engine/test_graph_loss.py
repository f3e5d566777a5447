"""Uploaded losses: what the SDK's client computes from them, the server computes; and what it refuses to."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.traced import LOSSES, on_the_client, reinforce, uploaded, wire
from twinkle_serve.engine import graph_loss as module
from twinkle_serve.engine.graph_loss import datum_tensors, graph_loss, try_graph
from twinkle_serve.engine.graph_operations import (
    FUNCTIONS,
    MATH_FUNCTIONS,
    METHODS,
    OPERATOR_FUNCTIONS,
    num_elements,
)
from twinkle_serve.engine.pulse import PULSE
from twinkle_serve.protocol.data import Column, DatumBatch
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.graph_names import TENSOR_OPERATIONS
from twinkle_serve.protocol.loss_graph import LossGraph, check_graph, read_graph


def random_datums(
    ranks: dict[str, Any], lengths: tuple[int, ...] = (5, 3, 9), width: int = 4
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(3)
    logprobs, data = [], []
    for length in lengths:
        shapes = {name: (length, width)[:rank] for name, rank in ranks.items()}
        target_shape = shapes.pop("logprobs")
        logprobs.append(-3 * torch.rand(target_shape, generator=generator) - 0.01)
        inputs = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
        if "index" in inputs:
            inputs["index"] = torch.randint(length, (length,), generator=generator)
        if "mask" in inputs:
            inputs["mask"] = (inputs["mask"] > 0.4).float()
            inputs["mask"][0] = 1.0
        data.append(inputs | {"target_tokens": torch.ones(target_shape, dtype=torch.int64)})
    return logprobs, data


def test_every_datum_is_a_sign_of_life() -> None:
    """No layer beats while losses are computed, and a microbatch of them may take long."""
    graph = uploaded(reinforce, logprobs=1, advantages=1)
    logprobs, data = random_datums({"logprobs": 1, "advantages": 1})
    before = PULSE.count
    on_the_server(graph, logprobs, data)
    assert PULSE.count - before == len(data)


def on_the_server(
    graph: LossGraph, logprobs: list[torch.Tensor], data: list[dict[str, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    leaf = torch.cat([each.reshape(-1) for each in logprobs]).requires_grad_()
    datums = [
        [lp, *(inputs[name] for name, _ in graph.inputs[1:])]
        for lp, inputs in zip(logprobs, data, strict=True)
    ]
    loss = graph_loss(graph, leaf, datums)
    (gradient,) = torch.autograd.grad(loss.value, leaf)
    return loss.value.detach(), gradient, {key: float(value) for key, value in loss.metrics.items()}


@pytest.mark.parametrize(("loss", "ranks"), LOSSES, ids=lambda each: getattr(each, "__name__", ""))
def test_value_and_gradient_are_the_clients(loss: Callable[..., Any], ranks: dict[str, Any]) -> None:
    graph = uploaded(loss, **ranks)
    try_graph(graph)
    logprobs, data = random_datums(ranks)
    value, gradient, metrics = on_the_server(graph, logprobs, data)
    expected, gradients, expected_metrics = on_the_client(loss, ranks, logprobs, data)
    assert float(value) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(
        gradient, torch.cat([each.reshape(-1) for each in gradients]), rtol=1e-6, atol=1e-7
    )
    assert gradient.abs().max() > 0
    assert metrics.pop("loss:sum") == float(value)
    # A mean is summed here, and divided by the number of datums once the whole request is done.
    sums = {key: number / (3 if key.endswith(":mean") else 1) for key, number in metrics.items()}
    assert sums == pytest.approx(expected_metrics, rel=1e-6)


def test_every_name_on_the_list_is_an_operation_of_torch() -> None:
    behind = {name.rpartition(".")[2] for name in FUNCTIONS} | set(METHODS)
    assert behind == TENSOR_OPERATIONS
    assert OPERATOR_FUNCTIONS["and_"] is operator.and_
    assert "exp" in MATH_FUNCTIONS
    for name, function in [*FUNCTIONS.items(), *METHODS.items()]:
        assert callable(function)
        assert not isinstance(function, type), name
        assert not name.endswith("_"), name


def test_tensors_have_the_shapes_that_were_declared() -> None:
    graph = uploaded(k3 := _three_ranks, logprobs=1, matrix=2, scale=0)
    assert k3 is _three_ranks
    zeros, twos = np.zeros(2, np.int32), np.full(2, 2, np.int32)
    batch = DatumBatch(
        np.arange(3, dtype=np.int32),
        np.array([1, 2]),
        {
            "target_tokens": Column(np.array([4, 5, 6]), zeros),
            "matrix": Column(np.arange(6, dtype=np.int64), twos),
            "scale": Column(np.array([0.5, 7, 7], np.float32), zeros),
        },
    )
    first, second = datum_tensors(graph, DatumBatch.unpack(batch.pack()))
    assert [list(each.shape) for each in first] == [[1], [1, 2], []]
    assert [list(each.shape) for each in second] == [[2], [2, 2], []]
    assert second[1].tolist() == [[2, 3], [4, 5]]
    assert (first[2].item(), second[2].item()) == (0.5, 7)


def _three_ranks(logprobs, matrix, scale):
    return (logprobs * matrix.sum(1) * scale).sum(), {}


# What is wrong with what a hostile or careless client sends ------------------------------------------


def call(name: str, target: str, *args: Any, op: str = "call_function", **kwargs: Any) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


def method(name: str, target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return call(name, target, *args, op="call_method", **kwargs)


def ref(name: str) -> dict[str, str]:
    return {"ref": name}


def graph_of(*nodes: dict[str, Any], loss: str = "loss", rank: int = 1) -> LossGraph:
    """A graph of one input x, the logprobs, whose last node is the sum of ``out``."""
    placeholder = {"op": "placeholder", "name": "x", "target": "logprobs", "args": [], "kwargs": {}}
    total = method("loss", "sum", ref("out"))
    output = call("output", "output", {"tuple": [ref(loss), {"dict": {}}]}, op="output")
    tree = {"format": 1, "nodes": [placeholder, *nodes, total, output]}
    return read_graph(check_graph("mine", [{"name": "logprobs", "rank": rank}], tree))


def refused(*nodes: dict[str, Any], length: int = 4, **options: Any) -> str:
    graph = graph_of(*nodes, **options)
    leaf = torch.full((length,), -1.0).requires_grad_()
    with pytest.raises(UserError) as error:
        graph_loss(graph, leaf, [[leaf.detach()]])
    assert leaf.grad is None
    return str(error.value)


X = ref("x")
SIZE = method("n", "size", X, 0)
OUT = method("out", "neg", X)
OUT_OF_WIDE = method("out", "sum", ref("wide"), -1)
STRIDED = {"layout": "strided"}
DEEP = [method(f"d{i}", "unsqueeze", X if i == 0 else ref(f"d{i - 1}"), 0) for i in range(9)]


@pytest.mark.parametrize(
    "node",
    [
        call("out", "torch.zeros", 10**9),
        call("out", "torch.zeros", {"tuple": [10**6, 10**6]}),
        call("out", "torch.full", [2**30], 1.0),
        call("out", "torch.ones", size=[2**31]),
        call("out", "torch.arange", 10**12),
        call("out", "torch.arange", 0, 1, 1e-9),
        call("out", "torch.arange", start=0, end=1.0, step=1e-10),
        method("out", "new_zeros", X, [2**20, 2**20]),
        method("out", "repeat", X, 10**9),
        method("out", "repeat", X, 2**20, 2**20),
        method("out", "expand", X, 2**40, -1),
        method("out", "tile", X, [2**30]),
        call("out", "torch.nn.functional.pad", X, {"tuple": [2**30, 0]}),
        call("out", "torch.diff", X, 2**40),
        call("out", "torch.diff", X, 2**40, -1, X, X),
        # Nothing in it, until a sum takes the empty dimension away.
        call("out", "torch.zeros", 2**40, 0),
        method("out", "repeat", X, 2**30, 0),
        method("out", "expand", X, 2**40, 0, -1),
    ],
    ids=lambda node: node["target"] + str(node["args"][:3]),
)
def test_what_would_be_huge_is_refused_before_it_is_made(node: dict[str, Any], monkeypatch: Any) -> None:
    name = node["target"].rpartition(".")[2]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was called")

    tables = {"FUNCTIONS": dict.fromkeys(FUNCTIONS, never), "METHODS": dict.fromkeys(METHODS, never)}
    for table, functions in tables.items():
        monkeypatch.setattr(module, table, functions)
    if name != "diff":
        assert "elements" in refused(node, length=4)
    else:
        assert "elements" in refused(node, length=2**14)


NO_LOGPROBS = call("none", "operator.getitem", X, {"slice": [0, 0, None]})
COUNT = call("count", "torch.full", [], 2.0**40)
WHOLE = call("whole", "torch.full", [], 2**40, dtype={"dtype": "int64"})
SMALLEST = [
    call("power", "torch.full", [9], -(2**53), dtype={"dtype": "int64"}),
    call("smallest", "operator.mul", ref("power"), 2**10),
]


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([NO_LOGPROBS, method("wide", "reshape", ref("none"), 2**40, 0), OUT_OF_WIDE], "elements"),
        (
            [
                NO_LOGPROBS,
                method("row", "reshape", ref("none"), 2**12, 1, 0),
                method("column", "reshape", ref("none"), 1, 2**12, 0),
                call("wide", "operator.add", ref("row"), ref("column")),
                OUT_OF_WIDE,
            ],
            "elements",
        ),
        ([COUNT, call("out", "torch.arange", ref("count"))], "arange takes plain numbers"),
        ([COUNT, call("out", "torch.arange", 0, end=ref("count"))], "arange takes plain numbers"),
        ([WHOLE, call("out", "operator.mul", [1, 2, 3], ref("whole"))], "tensors or numbers"),
        ([WHOLE, call("out", "operator.mul", ref("whole"), {"tuple": [1]})], "tensors or numbers"),
        ([call("out", "operator.getitem", X, [[0] * 60] * 60)], "is indexed by"),
        ([call("out", "operator.getitem", X, {"tuple": [{"tuple": [0] * 60}]})], "is indexed by"),
        ([call("out", "operator.getitem", X, [X, X])], "is indexed by"),
        ([*SMALLEST, call("out", "torch.div", ref("smallest"), -1, rounding_mode="trunc")], "'floor'"),
        ([*SMALLEST, method("out", "div", ref("smallest"), -1, rounding_mode="trunc")], "'floor'"),
    ],
    ids=str,
)
def test_ways_around_the_bounds_are_closed(nodes: list[dict[str, Any]], words: str) -> None:
    """Empty dimensions, sizes that only a tensor knows, lists that are repeated, indices within indices, and
    the one division that ends a process."""
    assert words in refused(*nodes)


def test_a_whole_number_is_divided_by_its_floor() -> None:
    nodes = [SIZE, call("half", "torch.full", [4], 7, dtype={"dtype": "int64"})]
    nodes += [call("three", "torch.div", ref("half"), 2, rounding_mode="floor")]
    leaf = torch.full((4,), -1.0).requires_grad_()
    loss = graph_loss(graph_of(*nodes, call("out", "operator.mul", X, ref("three"))), leaf, [[leaf.detach()]])
    assert loss.value.item() == -12


@pytest.mark.parametrize(
    "node",
    [
        call("out", "torch.floor_divide", X, 2.0),
        call("out", "torch.nn.functional.huber_loss", X, ref("whole"), reduction="none"),
    ],
    ids=lambda node: node["target"],
)
def test_what_cannot_be_differentiated_says_so(node: dict[str, Any]) -> None:
    """Only the way back fails."""
    whole = call("whole", "torch.full", [4], 1, dtype={"dtype": "int64"})
    assert "has no gradient: " in refused(whole, node)


def test_the_way_back_counts_as_well() -> None:
    """Each picks one of many, and the way back fills all of them again."""
    nodes = [method("many", "repeat", X, 2000)]
    nodes += [call("first", "torch.zeros", [1], dtype={"dtype": "int64"})]
    nodes += [call(f"p{i}", "operator.getitem", ref("many"), ref("first")) for i in range(100)]
    nodes += [method(f"q{i}", "gather", ref("many"), 0, ref("first")) for i in range(100)]
    picked = [ref(f"{kind}{i}") for i in range(30) for kind in "pq"]
    assert "elements" in refused(*nodes, call("out", "torch.cat", picked), length=64)


def test_growth_by_broadcasting_is_bounded() -> None:
    column = method("column", "unsqueeze", X, 1)
    assert "elements" in refused(column, call("out", "operator.add", X, ref("column")), length=5000)


def test_many_small_results_are_too_many_together() -> None:
    """No single one is large."""
    nodes = [method("n0", "repeat", X, 1000)]
    nodes += [call(f"n{i}", "torch.exp", ref(f"n{i - 1}")) for i in range(1, 400)]
    assert "all nodes together" in refused(*nodes, call("out", "torch.neg", ref("n399")))


def test_what_takes_long_counts_for_more() -> None:
    """As many elements of the one fit as do not of the other."""

    def nodes(name: str) -> list[dict[str, Any]]:
        many = [method("n0", "repeat", X, 1000)]  # 4,000 of 8,192 + 4 * 4,096
        return [*many, call("n1", f"torch.{name}", ref("n0")), call("out", "torch.neg", ref("n1"))]

    leaf = torch.full((4,), -1.5).requires_grad_()
    graph_loss(graph_of(*nodes("exp")), leaf, [[leaf.detach()]])
    for name in ("lgamma", "var"):
        assert "as much as 32000 elements" in refused(*nodes(name))


def test_rolls_count_their_shifts() -> None:
    x, shifts = torch.ones(10, 7), [1] * 64
    assert num_elements("method", "roll", [x, 3, 0], {}) == 70
    assert num_elements("method", "roll", [x, shifts, [0] * 64], {}) == 64 * 70
    assert num_elements("function", "roll", [x], {"shifts": tuple(shifts), "dims": (0,) * 64}) == 64 * 70
    assert num_elements("function", "roll", [], {"input": x, "shifts": shifts, "dims": [0] * 64}) == 64 * 70


def test_products_count_their_multiplications() -> None:
    a = torch.ones(300, 200)
    assert num_elements("function", "matmul", [a, torch.ones(200, 70)], {}) == 300 * 200 * 70
    assert num_elements("operator", "matmul", [torch.ones(5, 2, 3), torch.ones(3)], {}) == 5 * 2 * 3
    nodes = [call("a", "torch.outer", X, X), call("out", "operator.matmul", ref("a"), ref("a"))]
    assert "elements" in refused(*nodes, length=600)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of deviations of one number and the like
@pytest.mark.parametrize("name", sorted(TENSOR_OPERATIONS & set(METHODS)))
def test_no_result_is_larger_than_its_bound(name: str) -> None:
    """Every method on arguments that it might take; those it does not take do not count."""
    whole = torch.tensor([[0, 1, 2, 0], [1, 0, 1, 2], [2, 0, 1, 2]])
    attempts: list[tuple[Any, ...]] = [(), (0,), (1,), (2, 3), ((4, 3),), (-1,), (3, 3, 4), (0, 1), (1, 0, 2)]
    attempts += [
        ((5, 2), 1.0),
        (0, whole[0]),
        (0, whole),
        (whole,),
        (whole[:, :1].float(),),
        (torch.rand(2, 1, 4),),
    ]
    attempts += [
        (torch.rand(4),),
        (torch.rand(4, 5),),
        (torch.rand(1, 4, 5),),
        (0, (1, 3)),
        (whole.bool(), 1.0),
    ]
    attempts += [(torch.rand(3, 4), 0.5)]
    num_taken = 0
    for first in (torch.rand(3, 4) + 0.1, whole, torch.rand(4), torch.rand(1, 3, 4), whole.bool()):
        for arguments in attempts:
            try:
                result = METHODS[name](first, *arguments)
                bound = num_elements("method", name, [first, *arguments], {})
            except (RuntimeError, TypeError, IndexError, ValueError):
                continue
            num_taken += 1
            for part in result if isinstance(result, tuple) else (result,):
                if isinstance(part, torch.Tensor):
                    assert part.numel() <= max(bound, 1), (first, arguments)
    assert num_taken > 0


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([call("out", "torch.mv", X, X)], "node 'out' (torch.mv)"),
        ([call("out", "operator.getitem", X, 99)], "index 99 is out of bounds"),
        (
            [
                call("i", "torch.full", [2], 99, dtype={"dtype": "int64"}),
                method("out", "gather", X, 0, ref("i")),
            ],
            "index 99",
        ),
        ([call("s", "getattr", X, "shape"), call("p", "operator.mul", ref("s"), 10**9), OUT], "or numbers"),
        ([SIZE, call("p", "operator.pow", ref("n"), 10**9), OUT], "at most 64"),
        ([SIZE, call("p", "operator.pow", ref("n"), 60), OUT], "2^53"),
        ([call("p", "math.exp", X), OUT], "tensors or numbers"),
        ([SIZE, method("out", "neg", ref("n"))], "only be called on tensors"),
        ([call("s", "getattr", X, "values"), OUT], "no attribute 'values'"),
        ([SIZE, call("s", "getattr", ref("n"), "shape"), OUT], "no attribute 'shape'"),
        ([call("out", "torch.nn.functional.relu", X, inplace=True)], "in place"),
        ([method("out", "view", X, {"dtype": "bool"})], "view of another dtype"),
        ([method("out", "view", X, dtype={"dtype": "int64"})], "view of another dtype"),
        ([method("out", "size", X)], "only be called on tensors"),
        ([call("z", "torch.zeros", [4]), method("out", "neg", ref("z"))], "does not depend on logprobs"),
        ([method("d", "detach", X), method("out", "neg", ref("d"))], "does not depend on logprobs"),
        ([call("out", "torch.arange", {"float": "inf"})], "infinity"),
        ([call("out", "torch.pow", X, X, X, X)], "node 'out'"),
        ([*DEEP, method("out", "neg", ref("d8"))], "dimensions"),
    ],
    ids=str,
)
def test_what_fails_names_its_node(nodes: list[dict[str, Any]], words: str) -> None:
    message = refused(*nodes)
    assert words in message
    assert "custom loss 'mine'" in message


@pytest.mark.parametrize("loss", ["x", "out"])
def test_only_a_scalar_is_a_loss(loss: str) -> None:
    """The wrong rank is found before any data comes."""
    graph = graph_of(call("out", "torch.exp", X), loss=loss)
    with pytest.raises(UserError, match=r"scalar float tensor, got \[24\]"):
        try_graph(graph)


def test_a_trial_refuses_what_can_never_work() -> None:
    with pytest.raises(UserError, match="does not depend on logprobs"):
        try_graph(uploaded(lambda logprobs, weights: (weights.sum(), {}), logprobs=1, weights=1))
    with pytest.raises(UserError, match="mm"):
        try_graph(graph_of(call("out", "torch.mm", X, X)))
    # With one token this fails; it is not for a trial to say that data has only one.
    try_graph(graph_of(call("out", "operator.getitem", X, 100)))


def test_a_bad_metric_is_refused() -> None:
    graph = uploaded(lambda logprobs: (logprobs.sum(), {"custom/all:sum": logprobs}), logprobs=1)
    with pytest.raises(UserError, match=r"custom/all:sum.* is not a scalar"):
        try_graph(graph)


def test_devices_are_ignored_and_dtypes_are_not() -> None:
    nodes = [
        call("d", "getattr", X, "device"),
        call(
            "z", "torch.zeros", 4, device=ref("d"), dtype={"dtype": "float64"}, layout={"layout": "strided"}
        ),
        method("moved", "to", X, {"device": "cuda:7"}),
        method("again", "to", ref("moved"), ref("d")),
        call("out", "operator.add", ref("again"), ref("z")),
    ]
    leaf = torch.full((4,), -1.0).requires_grad_()
    loss = graph_loss(graph_of(*nodes), leaf, [[leaf.detach()]])
    assert loss.value.item() == -4
    assert torch.autograd.grad(loss.value, leaf)[0].tolist() == [1, 1, 1, 1]


def test_the_wire_form_of_the_sdk_is_what_is_read() -> None:
    fields = wire(reinforce, logprobs=1, advantages=1)
    graph = read_graph(check_graph(**fields))
    assert graph.name == "reinforce"
    assert graph.inputs == (("logprobs", 1), ("advantages", 1))
    assert set(graph.metrics) == {"custom/loss:sum", "custom/advantage:mean"}
