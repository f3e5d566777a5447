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
# Those that take at least five times as long as an exponential and its gradient, the last four over a
# dimension of two.
_LASTING = frozenset(
    {"sort", "argsort", "topk", "median", "lgamma", "digamma", "logcumsumexp", "cumprod"}
    | {"fmod", "remainder", "mod", "float_power"}
    | {"var", "std", "norm", "cosine_similarity"}
)
_LONG = 8


def volume(shape: Iterable[int]) -> int:
    """The elements of a tensor of this shape, where a dimension of 0 counts as 1: behind it another one could
    grow without end, until a later operation takes the empty one away."""
    return math.prod(max(1, size) for size in shape)


def cost(kind: str, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """What the node takes there and back, in elements: those of its result, or more where each takes long.
    ``name`` without its module. Raises as ``num_elements``."""
    return (_LONG if name in _LASTING else 1) * num_elements(kind, name, args, kwargs)


def num_elements(kind: str, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """A bound on the elements of the result and on the steps to it and back. ``name`` without its module.
    Raises RuntimeError or TypeError, as torch would, for arguments that cannot be right."""
    tensors = list(_tensors([*args, *kwargs.values()]))
    if kind == "operator" and name == "getitem":
        return _indexed(args[0], args[1]) if isinstance(args[0], torch.Tensor) else 1
    if kind == "operator" and not all(isinstance(arg, torch.Tensor | int | float) for arg in args):
        raise TypeError("it takes tensors or numbers")  # and repeats no list
    if kwargs.get("rounding_mode") == "trunc" and not any(tensor.is_floating_point() for tensor in tensors):
        # The smallest whole number by -1 ends the process (SIGFPE).
        raise TypeError("whole numbers are not divided with rounding_mode 'trunc'; 'floor' is served")
    if name in _PRODUCTS:
        return _product(*tensors[:2])
    if name in ELEMENTWISE or (kind == "operator" and name in _TENSOR_OPERATORS):
        return _elementwise(name, tensors)
    if name in GROWING:
        return _grown(name, args, kwargs, tensors)
    times = _num_shifts(args, kwargs) if name == "roll" else 1
    return times * max((volume(tensor.shape) for tensor in tensors), default=1)


def _num_shifts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """torch rolls by one shift after the other."""
    shifts = args[1] if len(args) > 1 else kwargs.get("shifts", 1)
    return max(1, len(shifts)) if isinstance(shifts, list | tuple) else 1


def _elementwise(name: str, tensors: Sequence[torch.Tensor]) -> int:
    size = volume(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)))
    # Of one tensor `where` gives the places that are not 0, dimension by dimension.
    return size * max(1, tensors[0].ndim) if name == "where" and len(tensors) == 1 else size


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _indexed(tensor: torch.Tensor, index: Any) -> int:
    """Of tensor[index]. Index tensors of whole numbers may name an element more than once; the way back
    fills all of ``tensor``."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(map(_is_index, parts)):
        raise TypeError(
            "a tensor is indexed by whole numbers, slices, None, Ellipsis, tensors and lists of whole numbers"
        )
    whole = volume(tensor.shape)
    chosen = [part for part in parts if isinstance(part, torch.Tensor) and part.dtype != torch.bool]
    lists = math.prod(max(1, len(part)) for part in parts if isinstance(part, list))
    if not chosen:
        return whole * lists
    size = volume(torch.broadcast_shapes(*(part.shape for part in chosen))) * lists
    if len(chosen) == len(parts) <= tensor.ndim:
        return max(whole, size * volume(tensor.shape[len(parts) :]))
    return size * whole


def _is_index(part: Any) -> bool:
    if isinstance(part, list):
        return all(isinstance(item, int) for item in part)
    return part is None or part is ... or isinstance(part, int | slice | torch.Tensor)


def _product(left: torch.Tensor, right: torch.Tensor) -> int:
    rows = left.shape[-2] if left.ndim > 1 else 1
    columns = right.shape[-1] if right.ndim > 1 else 1
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    return volume((*batch, rows, columns, left.shape[-1] if left.ndim else 1))


def _grown(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> int:
    """Of the operations whose result may be larger than everything that goes in."""
    volumes = [volume(tensor.shape) for tensor in tensors]
    match name:
        case "zeros" | "ones" | "full":
            return _size(args[:1] if name == "full" else args, kwargs)
        case "new_zeros" | "new_ones" | "new_full":
            return _size(args[1:2] if name == "new_full" else args[1:], kwargs)
        case "arange":
            bounds = [*args, *(kwargs[key] for key in ("start", "end", "step") if key in kwargs)]
            if not all(isinstance(value, int | float) for value in bounds):
                raise TypeError("arange takes plain numbers")
            return math.ceil(sum(abs(value) for value in bounds) / min(1, *map(_step, bounds), 1)) + 1
        case "expand" | "broadcast_to":
            sizes = _flat_sizes(args[1:], kwargs)
            known = tensors[0].shape
            padded = (1,) * (len(sizes) - len(known)) + tuple(known)
            return volume(old if new == -1 else new for old, new in zip(padded, sizes, strict=False))
        case "max" | "min":  # of one tensor, or of two element by element
            return volume(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)))
        case "expand_as":
            return volume(tensors[1].shape)
        case "repeat" | "tile":
            return volumes[0] * volume(_flat_sizes(args[1:], kwargs))
        case "outer":
            return volumes[0] * volumes[1]
        case "gather":  # the way back fills what was gathered from
            return max(volumes)
        case "diff":  # taken so many times, each on what the last one left; more tensors lengthen the first
            times = args[1] if len(args) > 1 else kwargs.get("n", 1)
            return sum(volumes) * max(1, min(int(times), sum(volumes)))
        case "index_select":
            return volumes[0] * volumes[1]
        case "pad":
            pads = [max(0, value) for value in _flat_sizes(args[1:2], kwargs)]
            sides = tensors[0].shape[-max(1, len(pads) // 2) :]
            return volume(size + sum(pads) for size in sides) * volumes[0]
    assert name in ("cat", "concat", "stack"), name
    return sum(volumes)


def _step(value: float) -> float:
    """What arange could be stepping by, if it is a step at all: only those below 1 make it longer."""
    return abs(value) if 0 < abs(value) < 1 else 1


def _size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    return volume(_flat_sizes(args, kwargs))


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
