"""Runs an uploaded loss on the logprobs of a request's datums, one datum after another, on the CPU.

Knows how to walk a checked graph, and what a datum's loss may cost. Does not know the wire
(protocol/loss_graph.py) nor what is behind a name (graph_operations.py). Cost is counted and never timed: a
request that is done again after a crash must end as it did the first time. It runs on the CPU also where the
model is on a GPU: the tensors are small, and there an index out of range is an error and not the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from twinkle_serve.engine.graph_operations import (
    FUNCTIONS,
    MATH_FUNCTIONS,
    METHODS,
    OPERATOR_FUNCTIONS,
    cost,
    volume,
)
from twinkle_serve.engine.losses import Loss
from twinkle_serve.engine.pulse import PULSE
from twinkle_serve.protocol.data import DatumBatch
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.loss_graph import Dtype, Ignored, LossGraph, Node, Ref
from twinkle_serve.protocol.losses import TARGETS

MAX_ELEMENTS = 2**24
FREE_ELEMENTS = 2**13
ELEMENTS_PER_LOGPROB = 4096
"""All results of a datum's nodes together: the free ones, and so many for each of its logprobs."""

_MAX_DIMENSIONS = 8
_MAX_NUMBER = 2.0**53
_DROPPED = frozenset({"device", "layout", "memory_format", "_stacklevel"})
# What torch and Python raise for arguments that do not fit each other.
_REFUSALS = (
    RuntimeError,
    TypeError,
    ValueError,
    IndexError,
    ArithmeticError,
    NotImplementedError,
    AttributeError,
)
_TRIAL_SHAPES = ((24, 8), (7, 3), (128, 16))
_MAX_TRIALS = 16
_TRIAL_ELEMENTS = 2**18

Tensors = Sequence[torch.Tensor]


def graph_loss(graph: LossGraph, logprobs: torch.Tensor, datums: Sequence[Tensors]) -> Loss:
    """The sum of the graph's loss over datums.

    logprobs: float32 [n], a leaf, datums end to end. datums: per datum its tensors in the order of
    ``graph.inputs``, on the CPU; the first only tells the shape of the logprobs. Raises UserError naming the
    node that fails, and then nothing has been changed.

    The gradient is taken here, datum by datum, so that only one datum's graph is in memory.
    """
    values = logprobs.detach().cpu()
    gradient = torch.empty_like(values)
    sums = dict.fromkeys(("loss:sum", *graph.metrics), 0.0)
    end = 0
    for tensors in datums:
        start, end = end, end + tensors[0].numel()
        leaf = values[start:end].reshape(tensors[0].shape).clone().requires_grad_()
        loss, found = _run(graph, [leaf, *tensors[1:]])
        gradient[start:end] = _gradient(graph, loss, leaf).reshape(-1)
        for key, number in (("loss:sum", float(loss.detach())), *found.items()):
            sums[key] += number
        PULSE.beat()  # no layer runs meanwhile, and many datums with many nodes take long
    metrics = {key: torch.tensor(number, dtype=torch.float64) for key, number in sums.items()}
    # Exactly the value and exactly the gradient: what is added is the same number, once with a graph.
    linear = (logprobs * gradient.to(logprobs.device)).sum(dtype=torch.float64)
    return Loss(metrics["loss:sum"].to(logprobs.device) + (linear - linear.detach()), metrics)


def datum_tensors(graph: LossGraph, batch: DatumBatch) -> list[list[torch.Tensor]]:
    """What ``graph_loss`` takes: of each datum the target tokens, in the place of the logprobs, and then the
    other inputs, [N], [N, K] or a scalar."""
    columns = []
    for name, rank in graph.inputs:
        column = batch.columns[TARGETS if name == "logprobs" else name]
        sizes = batch.lengths * np.maximum(1, column.widths)
        parts = torch.tensor(column.values).split(sizes.tolist())
        widths = column.widths.tolist()
        if rank == 2:
            parts = tuple(part.view(-1, width) for part, width in zip(parts, widths, strict=True))
        columns.append([part[0] for part in parts] if rank == 0 else parts)
    return [list(tensors) for tensors in zip(*columns, strict=True)]


def try_graph(graph: LossGraph) -> None:
    """Run it on made-up data of its ranks. Raises UserError if it fails whatever their lengths and dtypes:
    those are only known when data comes."""
    problem: UserError | None = None
    for tensors in _trials(graph):
        try:
            loss, _ = _run(graph, tensors, _TRIAL_ELEMENTS)
            _gradient(graph, loss, tensors[0])
            return
        except UserError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _trials(graph: LossGraph) -> Iterator[list[torch.Tensor]]:
    ranks = [rank for _, rank in graph.inputs]
    kinds = [(torch.float32,), *((torch.float32, torch.int64) for _ in ranks[1:])]
    for dtypes in itertools.islice(itertools.product(*kinds), _MAX_TRIALS):
        for shape in _TRIAL_SHAPES:
            tensors = [torch.ones(shape[:rank], dtype=d) for rank, d in zip(ranks, dtypes, strict=True)]
            # Not all the same, so that deviations and differences are not 0.
            spread = torch.linspace(-2.0, -0.5, tensors[0].numel()).reshape(tensors[0].shape)
            yield [spread.requires_grad_(), *tensors[1:]]


def _gradient(graph: LossGraph, loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    try:
        found = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
    except _REFUSALS as error:  # what a node computes, torch cannot always differentiate
        raise UserError(f"custom loss {graph.name!r} has no gradient: {_in_short(error)}") from None
    if found is None:
        raise UserError(f"custom loss {graph.name!r} does not depend on logprobs")
    return found


def _run(
    graph: LossGraph, tensors: Tensors, most: int = MAX_ELEMENTS
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of one datum, with its graph, and its metrics."""
    values: dict[str, Any] = {}
    inputs = iter(tensors)
    room = min(most, FREE_ELEMENTS + ELEMENTS_PER_LOGPROB * tensors[0].numel())
    for node in graph.nodes:
        if node.kind == "input":
            values[node.name] = next(inputs)
            continue
        where = f"custom loss {graph.name!r}, node {node.name!r} ({node.target})"
        try:
            size, values[node.name] = _compute(node, values, room)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except _REFUSALS as error:
            raise UserError(f"{where}: {_in_short(error)}") from None
        room -= size
    return _results(graph, values)


def _in_short(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _results(graph: LossGraph, values: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, float]]:
    loss = values[graph.loss]
    if not isinstance(loss, torch.Tensor) or loss.ndim != 0 or not loss.is_floating_point():
        shape = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise UserError(f"custom loss {graph.name!r} must return a scalar float tensor, got {shape}")
    metrics = {}
    for key, name in graph.metrics.items():
        value = values[name]
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise UserError(f"custom loss {graph.name!r}: the metric {key!r} is not a scalar tensor")
        metrics[key] = float(value.detach())
    return loss, metrics


def _compute(node: Node, values: Mapping[str, Any], room: int) -> tuple[int, Any]:
    """A bound on the node's size, and its result."""
    args = [_resolve(item, values) for item in node.args]
    if node.kind == "attribute":
        return 0, _attribute(args[0], node.target)
    kwargs = {k: _resolve(v, values) for k, v in node.kwargs.items() if v is not None and k not in _DROPPED}
    if kwargs.pop("inplace", False):
        raise UserError("operations in place are not served")
    if any(isinstance(item, torch.device) for item in args):  # x.to(device)
        return 0, args[0]
    function = _function(node, args)
    name = node.target.rpartition(".")[2]
    if name == "view" and any(isinstance(item, torch.dtype) for item in (*args, *kwargs.values())):
        raise UserError("a view of another dtype is not served")
    size = cost(node.kind, name, args, kwargs)
    _require_room(size, room)
    result = _checked(function(*args, **kwargs))
    # An empty result may have any shape at no cost; what is made of it next may not.
    size = max(size, _volume(result))
    _require_room(size, room)
    return size, result


def _require_room(size: int, room: int) -> None:
    if size > room:
        shown = size if size <= _MAX_NUMBER else "over 2^53"
        raise UserError(
            f"its result may take as much as {shown} elements, and {room} are left for this datum: all nodes "
            f"together have {FREE_ELEMENTS} + {ELEMENTS_PER_LOGPROB} for each logprob, at most {MAX_ELEMENTS}"
        )


def _volume(result: Any) -> int:
    if isinstance(result, tuple):
        return max(map(_volume, result), default=1)
    return volume(result.shape) if isinstance(result, torch.Tensor) else 1


def _function(node: Node, args: Sequence[Any]) -> Any:
    if node.kind == "method":
        if not args or not isinstance(args[0], torch.Tensor):
            raise UserError("methods can only be called on tensors")
        return METHODS[node.target] if node.target in METHODS else _missing()
    if node.kind == "function":
        return FUNCTIONS[node.target] if node.target in FUNCTIONS else _missing()
    if node.kind == "math":
        _require_numbers(args)
        return MATH_FUNCTIONS[node.target]
    assert node.kind == "operator", node.kind
    is_item = node.target == "getitem" and isinstance(args[0], tuple) and isinstance(args[1], int | slice)
    if not is_item and not any(isinstance(item, torch.Tensor) for item in args):
        _require_numbers(args)
        if node.target == "pow" and abs(args[1]) > 64:
            raise UserError("an exponent of a plain number may be at most 64")
    return OPERATOR_FUNCTIONS[node.target]


def _missing() -> Any:
    raise UserError("torch has no such operation")


def _require_numbers(args: Sequence[Any]) -> None:
    if not all(isinstance(item, int | float) for item in args):
        raise UserError("it takes tensors or numbers")


def _attribute(value: Any, name: str) -> Any:
    if name in ("values", "indices"):
        if isinstance(value, tuple) and hasattr(type(value), name):  # what max, sort and topk return
            return value[0 if name == "values" else 1]
    elif isinstance(value, torch.Tensor):
        return getattr(value, name)
    raise UserError(f"it has no attribute {name!r} that can be read")


def _resolve(item: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(item, Ref):
        return values[item.name]
    if isinstance(item, Dtype):
        return getattr(torch, item.name)
    if isinstance(item, Ignored):
        return torch.device("cpu")
    if isinstance(item, slice):
        return slice(*(_resolve(part, values) for part in (item.start, item.stop, item.step)))
    if isinstance(item, list | tuple):
        return type(item)(_resolve(part, values) for part in item)
    return item


def _checked(result: Any) -> Any:
    """A result that later nodes may use."""
    if isinstance(result, torch.Tensor):
        if result.ndim > _MAX_DIMENSIONS:
            raise UserError(
                f"its result has {result.ndim} dimensions; at most {_MAX_DIMENSIONS} are possible"
            )
        if result.is_complex():
            raise UserError("complex numbers are not served")
        return result
    if isinstance(result, int | float):
        if abs(result) > _MAX_NUMBER:
            raise UserError("it gives a number beyond 2^53")
        return result
    if isinstance(result, tuple):
        for part in result:
            _checked(part)
        return result
    raise UserError(f"it gives a {type(result).__name__}, which a loss cannot use")
