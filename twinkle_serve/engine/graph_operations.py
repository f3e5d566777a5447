"""What is behind each name that an uploaded loss may use: a function of torch, and a bound on its result.

Knows how large a result can become from the shapes and numbers that go in, so that nothing is allocated
before its size is known to be fine. Does not know nodes, graphs or budgets (graph_loss.py).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional

from twinkle_serve.protocol.graph_names import (
    ELEMENTWISE,
    GROWING,
    MATH,
    MODULES,
    OPERATORS,
    TENSOR_OPERATIONS,
)

_NAMESPACES = {
    "torch": torch,
    "torch.nn.functional": torch.nn.functional,
    "torch._C._nn": torch._C._nn,
    "torch.special": torch.special,
    "torch.functional": torch.functional,
}
assert tuple(_NAMESPACES) == MODULES

# Resolved once, from our own names: what a client sends is only ever a key.
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    f"{module}.{name}": getattr(space, name)
    for module, space in _NAMESPACES.items()
    for name in TENSOR_OPERATIONS
    if callable(getattr(space, name, None))
}
METHODS: Mapping[str, Callable[..., Any]] = {
    name: getattr(torch.Tensor, name) for name in TENSOR_OPERATIONS if hasattr(torch.Tensor, name)
}
OPERATOR_FUNCTIONS: Mapping[str, Callable[..., Any]] = {name: getattr(operator, name) for name in OPERATORS}
MATH_FUNCTIONS: Mapping[str, Callable[..., Any]] = {name: getattr(math, name) for name in MATH}

_TENSOR_OPERATORS = OPERATORS - {"getitem", "matmul"}
_PRODUCTS = frozenset({"matmul", "mm", "mv", "bmm"})


def num_elements(kind: str, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """A bound on the elements of the result and on the steps to it. ``name`` without its module. Raises
    RuntimeError or TypeError, as torch would, for arguments that cannot be right."""
    tensors = list(_tensors([*args, *kwargs.values()]))
    if kind == "operator" and name == "getitem":
        return _indexed(args[0], args[1]) if tensors else 1
    if name in _PRODUCTS:
        return _product(*tensors[:2])
    if name in ELEMENTWISE or (kind == "operator" and name in _TENSOR_OPERATORS):
        return math.prod(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)))
    if name in GROWING:
        return _grown(name, args, kwargs, tensors)
    return max((tensor.numel() for tensor in tensors), default=1)


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _indexed(tensor: torch.Tensor, index: Any) -> int:
    """Of tensor[index]. Index tensors of whole numbers may name an element more than once."""
    parts = index if isinstance(index, tuple) else (index,)
    chosen = [part for part in parts if isinstance(part, torch.Tensor) and part.dtype != torch.bool]
    lists = math.prod(len(part) for part in parts if isinstance(part, list))
    if not chosen:
        return tensor.numel() * lists
    size = math.prod(torch.broadcast_shapes(*(part.shape for part in chosen))) * lists
    if len(chosen) == len(parts) <= tensor.ndim:
        return size * math.prod(tensor.shape[len(parts) :])
    return size * tensor.numel()


def _product(left: torch.Tensor, right: torch.Tensor) -> int:
    rows = left.shape[-2] if left.ndim > 1 else 1
    columns = right.shape[-1] if right.ndim > 1 else 1
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    return math.prod(batch) * rows * columns * (left.shape[-1] if left.ndim else 1)


def _grown(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> int:
    """Of the operations whose result may be larger than everything that goes in."""
    match name:
        case "zeros" | "ones" | "full":
            return _size(args[:1] if name == "full" else args, kwargs)
        case "new_zeros" | "new_ones" | "new_full":
            return _size(args[1:2] if name == "new_full" else args[1:], kwargs)
        case "arange":
            bounds = [value for value in args if isinstance(value, int | float)]
            bounds += [kwargs[key] for key in ("start", "end", "step") if key in kwargs]
            return math.ceil(sum(abs(value) for value in bounds) / min(1, *map(_step, bounds), 1)) + 1
        case "expand" | "broadcast_to":
            sizes = _flat_sizes(args[1:], kwargs)
            known = tensors[0].shape
            padded = (1,) * (len(sizes) - len(known)) + tuple(known)
            return math.prod(old if new == -1 else new for old, new in zip(padded, sizes, strict=False))
        case "max" | "min":  # of one tensor, or of two element by element
            return math.prod(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)))
        case "expand_as":
            return tensors[1].numel()
        case "repeat" | "tile":
            return tensors[0].numel() * math.prod(_flat_sizes(args[1:], kwargs))
        case "outer":
            return tensors[0].numel() * tensors[1].numel()
        case "gather":
            return tensors[1].numel()
        case "diff":  # taken so many times, each on what the last one left
            times = args[1] if len(args) > 1 else kwargs.get("n", 1)
            return tensors[0].numel() * max(1, min(int(times), tensors[0].numel()))
        case "index_select":
            return tensors[1].numel() * tensors[0].numel()
        case "pad":
            pads = [max(0, value) for value in _flat_sizes(args[1:2], kwargs)]
            return math.prod(size + sum(pads) for size in tensors[0].shape[-max(1, len(pads) // 2) :]) * max(
                1, tensors[0].numel()
            )
    assert name in ("cat", "concat", "stack"), name
    return sum(tensor.numel() for tensor in tensors)


def _step(value: float) -> float:
    """What arange could be stepping by, if it is a step at all: only those below 1 make it longer."""
    return abs(value) if 0 < abs(value) < 1 else 1


def _size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    return math.prod(_flat_sizes(args, kwargs))


def _flat_sizes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    """The sizes among arguments, given one by one, as a list, or by a keyword. Raises TypeError."""
    values: list[Any] = []
    for value in [
        *args,
        *(kwargs[key] for key in ("size", "shape", "repeats", "dims", "pad") if key in kwargs),
    ]:
        values += value if isinstance(value, list | tuple) else [value]
    sizes = [value for value in values if isinstance(value, int)]
    if len(sizes) < len(values):
        raise TypeError("sizes must be whole numbers")
    return sizes
