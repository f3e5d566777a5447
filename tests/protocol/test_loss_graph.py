"""Uploaded graphs as plain data: the SDK's form is read, and everything hostile in it is refused by name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.engine.traced import LOSSES, wire
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.graph_names import find_operation
from twinkle_serve.protocol.loss_graph import (
    MAX_METRICS,
    MAX_NODES,
    MAX_TEXT_BYTES,
    Dtype,
    Ignored,
    Node,
    Ref,
    check_graph,
    read_graph,
)

PLACEHOLDER = {"op": "placeholder", "name": "x", "target": "logprobs", "args": [], "kwargs": {}}
INPUTS = [{"name": "logprobs", "rank": 1}]
X = {"ref": "x"}


def node(target: str = "torch.neg", *args: Any, op: str = "call_function", **kwargs: Any) -> dict[str, Any]:
    return {"op": op, "name": "y", "target": target, "args": list(args or (X,)), "kwargs": kwargs}


def output(loss: Any = None, metrics: Any = None) -> dict[str, Any]:
    pair = {"tuple": [{"ref": "y"} if loss is None else loss, {"dict": metrics or {}}]}
    return {"op": "output", "name": "output", "target": "output", "args": [pair], "kwargs": {}}


def tree(*nodes: Any) -> dict[str, Any]:
    return {"format": 1, "nodes": [PLACEHOLDER, *nodes, output()]}


def refused(graph: Any, inputs: Any = INPUTS, name: Any = "mine") -> str:
    with pytest.raises(UserError) as error:
        check_graph(name, inputs, graph)
    message = str(error.value)
    assert len(message) < 1000
    return message


@pytest.mark.parametrize(("loss", "ranks"), LOSSES, ids=lambda each: getattr(each, "__name__", ""))
def test_what_the_sdk_sends_is_read(loss: Any, ranks: dict[str, Any]) -> None:
    text = check_graph(**wire(loss, **ranks))
    graph = read_graph(text)
    assert dict(graph.inputs) == ranks
    assert graph.name == loss.__name__
    assert [each.name for each in graph.nodes if each.kind == "input"] == list(ranks)
    assert json.loads(text)["name"] == loss.__name__


def test_every_kind_of_argument_is_read() -> None:
    given = [
        *(X, 1, -0.5, True, None, [1, X], {"tuple": [1, {"slice": [None, X, 2]}]}, {"ellipsis": True}),
        *({"float": "-inf"}, {"dtype": "int64"}, {"device": "cuda:3"}, {"layout": "strided"}),
    ]
    graph = read_graph(check_graph("mine", INPUTS, tree(node("torch.sum", *given, dim=0, keepdim=True))))
    assert graph.nodes[1] == Node(
        "y",
        "function",
        "torch.sum",
        (
            *(Ref("x"), 1, -0.5, True, None, [1, Ref("x")], (1, slice(None, Ref("x"), 2)), ...),
            *(-math.inf, Dtype("int64"), Ignored(), Ignored()),
        ),
        {"dim": 0, "keepdim": True},
    )


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "builtins.eval", "builtins.exec", "torch.load", "torch.save", "torch.hub.load"),
        *("torch.ops.load_library", "torch.utils.cpp_extension.load", "torch.jit.script", "torch.compile"),
        *("torch.empty", "torch.empty_like", "torch.rand", "torch.randn_like", "torch.as_strided"),
        *("torch.from_file", "torch.frombuffer", "torch.set_num_threads", "torch.nonzero", "torch.exp_"),
        *("torch.bernoulli", "torch.nn.functional.dropout", "torch.repeat_interleave", "torch.linalg.svd"),
        *("torch.__dict__", "torch.exp.__globals__", "torch.Tensor.exp", "exp", "", "torch.", ".exp"),
        *("operator.setitem", "operator.iadd", "operator.attrgetter", "operator.call"),
        *("math.factorial", "math.comb", "math.perm", "torch.einsum", "torch.cuda.synchronize"),
    ],
)  # fmt: skip
def test_functions_that_are_not_on_the_list_are_refused(target: str) -> None:
    message = refused(tree(node(target)))
    assert repr(target) in message
    assert "node 'y'" in message


@pytest.mark.parametrize(
    "target",
    [
        *("__class__", "__reduce__", "__getattribute__", "__init__", "apply_", "map_", "set_", "resize_"),
        *("numpy", "tolist", "item", "backward", "register_hook", "requires_grad_", "storage"),
        *("untyped_storage", "data_ptr", "cuda", "new_empty", "new_tensor", "as_strided", "fill_", "exp_"),
        *("copy_", "random_", "uniform_", "exponential_", "pin_memory", "module_load", "put_"),
    ],
)  # fmt: skip
def test_methods_that_are_not_on_the_list_are_refused(target: str) -> None:
    assert repr(target) in refused(tree(node(target, op="call_method")))


@pytest.mark.parametrize(
    "name",
    ["__class__", "__dict__", "grad_fn", "data", "_backward_hooks", "grad", "names", "H", "real", 7, X],
)
def test_attributes_that_are_not_on_the_list_are_refused(name: Any) -> None:
    for target in ("getattr", "builtins.getattr"):
        assert "only these attributes" in refused(tree(node(target, X, name)))


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (None, "graph must be"),
        ([], "graph must be"),
        ({"nodes": {}}, "graph must be"),
        ({"format": 2, "nodes": []}, "graph must be"),
        ({"nodes": []}, "graph has no output"),
        ({"nodes": [output()]}, "placeholders come first"),
        ({"nodes": [PLACEHOLDER]}, "one output last"),
        ({"nodes": [PLACEHOLDER, output(), node()]}, "one output last"),
        ({"nodes": [PLACEHOLDER, {**PLACEHOLDER, "name": "z"}, output()]}, "placeholders come first"),
        ({"nodes": [{**PLACEHOLDER, "target": "weights"}, output()]}, "must be the placeholder of logprobs"),
        ({"nodes": [{**PLACEHOLDER, "args": [1]}, output()]}, "without a default"),
        (tree(7), "not a new name"),
        (tree({**node(), "name": "x"}), "not a new name"),
        (tree({**node(), "name": "a" * 500}), "not a new name"),
        (tree({**node(), "name": "a b"}), "not a new name"),
        (tree({**node(), "op": "call_module"}), "op 'call_module' is not served"),
        (tree({**node(), "op": "get_attr", "target": "weight"}), "op 'get_attr' is not served"),
        (tree({**node(), "op": ["call_function"]}), "is not served"),
        (tree({**node(), "target": ["torch.exp"]}), "target must be text"),
        (tree({**node(), "target": "torch." + "x" * 1000}), "target must be text"),
        (tree({**node(), "args": {"0": X}}), "args must be a list"),
        (tree({**node(), "kwargs": [1]}), "kwargs an object"),
        (tree(node("torch.exp", X, out=X)), "keyword argument 'out'"),
        (tree(node("torch.exp", X, requires_grad=True)), "keyword argument 'requires_grad'"),
        (tree(node("torch.exp", X, generator=X)), "keyword argument 'generator'"),
        (tree(node("torch.exp", X, __class__=X)), "keyword argument '__class__'"),
        (tree(node("torch.exp", *[X] * 65)), "more than 64 arguments"),
        (tree(node("torch.cat", [X] * 65)), "at most 64 items"),
        (tree(node("torch.exp", {"ref": "later"})), "no earlier node"),
        (tree(node("torch.exp", {"ref": "y"})), "no earlier node"),
        (tree(node("torch.exp", {"ref": ["x"]})), "'ref' is not an argument"),
        (tree(node("torch.exp", "__import__('os')")), "is not an argument that is served"),
        (tree(node("torch.exp", 2**60)), "beyond 2^53"),
        (tree(node("torch.exp", {"float": "1e999"})), "'float' is not an argument"),
        (tree(node("torch.exp", {"dtype": "complex64"})), "dtype 'complex64' is not served"),
        (tree(node("torch.exp", {"layout": "sparse_coo"})), "'layout' is not an argument"),
        (tree(node("torch.exp", {"pickle": "gASV"})), "'pickle' is not an argument"),
        (tree(node("torch.exp", {"dict": {}})), "'dict' is not an argument"),
        (tree(node("torch.exp", {"a": 1, "b": 2})), "is not an argument"),
        (tree(node("torch.exp", {"slice": [1]})), "'slice' is not an argument"),
        (tree(node("torch.exp", [[[[[[[[1]]]]]]]])), "nested deeper"),
        ({"nodes": [PLACEHOLDER, node(), {**output(), "args": [{"ref": "y"}]}]}, "a tuple of the loss"),
        ({"nodes": [PLACEHOLDER, node(), {**output(), "args": []}]}, "a tuple of the loss"),
        ({"nodes": [PLACEHOLDER, node(), output(loss=1.0)]}, "a tuple of the loss"),
        ({"nodes": [PLACEHOLDER, node(), output(loss={"ref": "z"})]}, "no earlier node"),
        ({"nodes": [PLACEHOLDER, node(), output(metrics={"loss:sum": X})]}, "named custom/<name>"),
        ({"nodes": [PLACEHOLDER, node(), output(metrics={"custom/a:max": X})]}, "named custom/<name>"),
        ({"nodes": [PLACEHOLDER, node(), output(metrics={"custom/a:sum": 1})]}, "must be a tensor"),
        (
            {"nodes": [PLACEHOLDER, node(), output(metrics={f"custom/{i}:sum": X for i in range(65)})]},
            f"at most {MAX_METRICS}",
        ),
    ],
    ids=lambda each: str(each)[:60],
)
def test_a_malformed_graph_is_refused_by_name(graph: Any, words: str) -> None:
    assert words in refused(graph)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (None, "a list of 1 to 16"),
        ([], "a list of 1 to 16"),
        ([{"name": f"n{i}", "rank": 1} for i in range(17)], "a list of 1 to 16"),
        ([7], "not a lowercase name"),
        ([{"name": "Logprobs", "rank": 1}], "not a lowercase name"),
        ([{"name": "logprobs", "rank": 3}], "has rank 3"),
        ([{"name": "logprobs", "rank": True}], "has rank True"),
        ([{"name": "logprobs", "rank": -1}], "has rank -1"),
        ([{"name": "logprobs", "rank": 0}], "of rank 1 or 2"),
        ([{"name": "weights", "rank": 1}], "the first must be logprobs"),
        ([*INPUTS, *INPUTS], "there twice"),
    ],
    ids=str,
)
def test_inputs_have_names_and_ranks(inputs: Any, words: str) -> None:
    assert words in refused(tree(node()), inputs)


@pytest.mark.parametrize("name", [None, "", "n" * 201, 7])
def test_a_loss_has_a_name(name: Any) -> None:
    assert "name must be text" in refused(tree(node()), name=name)


def test_a_graph_has_an_end() -> None:
    chain = [
        {**node("torch.neg", {"ref": f"n{i - 1}"} if i else X), "name": f"n{i}"} for i in range(MAX_NODES)
    ]
    assert f"at most {MAX_NODES}" in refused({"nodes": [PLACEHOLDER, *chain, output(loss={"ref": "n0"})]})
    assert f"at most {MAX_TEXT_BYTES}" in refused({"nodes": [PLACEHOLDER], "more": "x" * MAX_TEXT_BYTES})
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert "nested too deeply" in refused(tree(node("torch.exp", deep)))
    assert "not finite" in refused(tree(node("torch.exp", math.inf)))


def test_names_are_found_as_the_sdk_spells_them() -> None:
    assert find_operation("call_function", "torch._C._nn.log_sigmoid", "") == (
        "function",
        "torch._C._nn.log_sigmoid",
    )
    assert find_operation("call_function", "torch._C._special.special_expit", "") == (
        "function",
        "torch.special.expit",
    )
    assert find_operation("call_function", "torch.functional.norm", "") == (
        "function",
        "torch.functional.norm",
    )
    assert find_operation("call_function", "_operator.truediv", "") == ("operator", "truediv")
    assert find_operation("call_function", "math.sqrt", "") == ("math", "sqrt")
    assert find_operation("call_method", "swapaxes", "") == ("method", "transpose")
