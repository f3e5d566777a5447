"""A custom loss that a client uploaded: its traced graph as plain data, checked node by node.

Knows the wire form of the SDK's ``create_custom_loss`` and which operations may be named. Does not know how
one is computed (engine/graph_loss.py). Nothing in here is ever executed or looked up by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.graph_names import ATTRIBUTES, DTYPES, KEYWORDS, TEXTS, find_operation

GRAPH = "graph"
"""Where a pass with an uploaded loss carries the whole of it, among its loss_config: whoever does it again
after a crash needs nothing else."""

MAX_NODES = 512
MAX_INPUTS = 16
MAX_METRICS = 64
MAX_TEXT_BYTES = 256 * 1024
MAX_NODE_RUNS = 2**19
"""Nodes times datums of one request: each costs a fixed time (some 20 to 90 us, by its operation), however
small its tensors are."""

_NODE_RUNS_PER_TOKEN = 32

_MAX_DEPTH = 6
_MAX_ARGUMENTS = 64
_MAX_INTEGER = 2**53
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_INPUT = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")


@dataclass(frozen=True, slots=True)
class Ref:
    """The result of an earlier node."""

    name: str


@dataclass(frozen=True, slots=True)
class Dtype:
    """A tensor dtype by its torch name."""

    name: str


@dataclass(frozen=True, slots=True)
class Ignored:
    """A device, layout or memory format: a loss runs where the server wants, on strided tensors."""


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. kind: "function", "method" or "attribute"; target: its name in graph_names.py.

    Arguments are numbers, text, None, Ellipsis, slices, Refs, Dtypes, Ignored, and tuples or lists of those.
    """

    name: str
    kind: str
    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LossGraph:
    """name: what the user called it. inputs: (name, rank) each, ``logprobs`` first. loss: the node that is
    the scalar. metrics: nodes that are scalars, by a name that ends in ``:sum`` or ``:mean``."""

    name: str
    inputs: tuple[tuple[str, int], ...]
    nodes: tuple[Node, ...]
    loss: str
    metrics: Mapping[str, str]


def loss_tokens(graph: LossGraph, num_datums: int) -> int:
    """What a pass with this loss costs at least, in tokens, however short its datums are: so that
    MAX_NODE_RUNS fill a tick of the default size."""
    return len(graph.nodes) * num_datums // _NODE_RUNS_PER_TOKEN


def check_graph(name: object, inputs: object, graph: object) -> str:
    """The three fields of ``create_custom_loss`` as one text that ``read_graph`` takes. Raises UserError
    naming the node and what is wrong with it."""
    tree = {"name": name, "inputs": inputs, "graph": graph}
    try:
        text = json.dumps(tree, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError):
        raise UserError("graph is nested too deeply or has a number that is not finite") from None
    if len(text) > MAX_TEXT_BYTES:
        raise UserError(f"graph has {len(text)} bytes; at most {MAX_TEXT_BYTES} are possible")
    read_graph(text)
    return text


@lru_cache(maxsize=64)
def read_graph(text: str) -> LossGraph:
    """The graph in a text that check_graph made. Raises UserError if it is not one."""
    tree = json.loads(text)
    name = tree["name"]
    if not isinstance(name, str) or not 0 < len(name) <= 200:
        raise UserError("name must be text of 1 to 200 characters")
    inputs = _read_inputs(tree["inputs"])
    graph = tree["graph"]
    nodes = graph.get("nodes") if isinstance(graph, dict) else None
    if not isinstance(nodes, list) or graph.get("format", 1) != 1:
        raise UserError("graph must be {format: 1, nodes: [...]}")
    if len(nodes) > MAX_NODES:
        raise UserError(f"graph has {len(nodes)} nodes; at most {MAX_NODES} are possible")
    return _read_nodes(name, inputs, nodes)


def _read_inputs(given: object) -> tuple[tuple[str, int], ...]:
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_INPUTS:
        raise UserError(f"inputs must be a list of 1 to {MAX_INPUTS}, logprobs first")
    inputs = []
    for item in given:
        name, rank = (item.get("name"), item.get("rank")) if isinstance(item, dict) else (None, None)
        if not isinstance(name, str) or not _INPUT.fullmatch(name):
            raise UserError(f"inputs: {name!r:.80} is not a lowercase name")
        if type(rank) is not int or not 0 <= rank <= 2:
            raise UserError(f"inputs: {name} has rank {rank!r:.40}; 0, 1 and 2 are possible")
        inputs.append((name, rank))
    if inputs[0][0] != "logprobs" or inputs[0][1] == 0:
        raise UserError("inputs: the first must be logprobs, of rank 1 or 2")
    if len({name for name, _ in inputs}) < len(inputs):
        raise UserError("inputs: a name is there twice")
    return tuple(inputs)


def _read_nodes(name: str, inputs: tuple[tuple[str, int], ...], nodes: list[Any]) -> LossGraph:
    """Placeholders for every input, then operations on what came before, then one output."""
    known: set[str] = set()
    operations = []
    for index, raw in enumerate(nodes):
        where = f"graph.nodes[{index}]"
        op, node_name = (raw.get("op"), raw.get("name")) if isinstance(raw, dict) else (None, None)
        if not isinstance(node_name, str) or not _NAME.fullmatch(node_name) or node_name in known:
            raise UserError(f"{where}.name {node_name!r:.80} is not a new name")
        where = f"node {node_name!r}"
        is_last = index == len(nodes) - 1
        if (op == "placeholder") != (index < len(inputs)) or (op == "output") != is_last:
            raise UserError(f"{where}: {len(inputs)} placeholders come first and one output last")
        if op == "placeholder":
            if raw.get("target") != inputs[index][0] or raw.get("args") or raw.get("kwargs"):
                raise UserError(f"{where} must be the placeholder of {inputs[index][0]}, without a default")
            operations.append(Node(node_name, "input", inputs[index][0], (), {}))
        elif op == "output":
            loss, metrics = _read_output(raw.get("args"), known)
            return LossGraph(name, inputs, tuple(operations), loss, metrics)
        else:
            operations.append(_read_operation(where, node_name, op, raw, known))
        known.add(node_name)
    raise UserError("graph has no output")


def _read_operation(where: str, name: str, op: object, raw: dict[str, Any], known: set[str]) -> Node:
    given, named = raw.get("args", []), raw.get("kwargs", {})
    if not isinstance(given, list) or not isinstance(named, dict):
        raise UserError(f"{where}: args must be a list and kwargs an object")
    if len(given) + len(named) > _MAX_ARGUMENTS:
        raise UserError(f"{where} has more than {_MAX_ARGUMENTS} arguments")
    kind, target = find_operation(op, raw.get("target"), where)
    for key in named:
        if key not in KEYWORDS:
            raise UserError(f"{where}: the keyword argument {key!r:.80} is not served")
    if kind == "attribute":
        return _read_attribute(where, name, given, named, known)
    args = tuple(_argument(item, known, where) for item in given)
    kwargs = {key: _argument(item, known, where) for key, item in named.items()}
    return Node(name, kind, target, args, kwargs)


def _read_attribute(where: str, name: str, given: list[Any], named: dict[str, Any], known: set[str]) -> Node:
    if len(given) != 2 or named or not isinstance(given[1], str) or given[1] not in ATTRIBUTES:
        raise UserError(f"{where}: only these attributes can be read: {', '.join(sorted(ATTRIBUTES))}")
    owner = _argument(given[0], known, where)
    if not isinstance(owner, Ref):
        raise UserError(f"{where}: an attribute is read from the result of a node")
    return Node(name, "attribute", given[1], (owner,), {})


def _read_output(args: object, known: set[str]) -> tuple[str, dict[str, str]]:
    shape = "the output must be a tuple of the loss and a dict of metrics"
    pair = args[0] if isinstance(args, list) and len(args) == 1 else None
    if isinstance(pair, dict) and set(pair) == {"tuple"}:
        pair = pair["tuple"]
    if not isinstance(pair, list) or len(pair) != 2:
        raise UserError(shape)
    loss = _argument(pair[0], known, "output")
    metrics = pair[1].get("dict") if isinstance(pair[1], dict) and set(pair[1]) == {"dict"} else None
    if not isinstance(loss, Ref) or not isinstance(metrics, dict) or len(metrics) > MAX_METRICS:
        raise UserError(f"{shape}, at most {MAX_METRICS} of them")
    found = {}
    for key, value in metrics.items():
        node = _argument(value, known, "output")
        if not _METRIC.fullmatch(key) or not isinstance(node, Ref):
            raise UserError(f"the metric {key!r:.80} must be a tensor named custom/<name>:sum or :mean")
        found[key] = node.name
    return loss.name, found


def _argument(value: Any, known: set[str], where: str, depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        raise UserError(f"{where}: an argument is nested deeper than {_MAX_DEPTH}")
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        if abs(value) > _MAX_INTEGER:
            raise UserError(f"{where}: whole numbers beyond 2^53 are not served")
        return value
    if isinstance(value, str):
        if value not in TEXTS:
            raise UserError(f"{where}: the text {value!r:.80} is not an argument that is served")
        return value
    if isinstance(value, list):
        return _items(value, known, where, depth)
    if not isinstance(value, dict) or len(value) != 1:
        raise UserError(f"{where}: {value!r:.80} is not an argument")
    ((kind, inner),) = value.items()
    return _tagged(kind, inner, known, where, depth)


def _items(values: Any, known: set[str], where: str, depth: int) -> list[Any]:
    if not isinstance(values, list) or len(values) > _MAX_ARGUMENTS:
        raise UserError(f"{where}: a list of at most {_MAX_ARGUMENTS} items is expected")
    return [_argument(item, known, where, depth + 1) for item in values]


def _tagged(kind: str, inner: Any, known: set[str], where: str, depth: int) -> Any:
    """One of the one-key objects that stand for what JSON has no form for."""
    if kind == "ref" and isinstance(inner, str):
        if inner not in known:
            raise UserError(f"{where} refers to {inner!r:.80}, which no earlier node is called")
        return Ref(inner)
    if kind == "tuple":
        return tuple(_items(inner, known, where, depth))
    if kind == "slice":
        parts = _items(inner, known, where, depth)
        if len(parts) == 3:
            return slice(*parts)
    if kind == "ellipsis" and inner is True:
        return ...
    if kind == "float" and inner in ("inf", "-inf", "nan"):
        return math.nan if inner == "nan" else math.copysign(math.inf, -1 if inner == "-inf" else 1)
    if kind == "dtype" and isinstance(inner, str):
        if inner not in DTYPES:
            raise UserError(f"{where}: dtype {inner!r:.40} is not served; served are {', '.join(DTYPES)}")
        return Dtype(inner)
    if (kind, inner) in (("layout", "strided"), ("memory_format", "contiguous_format")) or kind == "device":
        return Ignored()
    raise UserError(f"{where}: {kind!r:.40} is not an argument that is served")
