"""What a run's training looked like: loss, learning rate and tokens by optimizer step, in bounded memory.

Knows numbers by step. Does not know where they come from (watch.py) or how they are drawn (console/).
"""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_POINTS = 512
MAX_RUNS = 2_000
MAX_NAMES = 32
# Passes since the last step that are known one by one; of older ones only their sums are.
MAX_PASSES = 256
# How two neighbouring points become one when the ring is full; everything else is averaged.
_LAST = ("seq_id", "step", "time", "total_tokens")
_SUMMED = ("tokens",)
# What the sums of a pass are divided by, the first of these that is there.
_WEIGHTS = ("weight:sum", "scored_tokens:sum")


class Curves:
    """Columns of equal length, one row a point, NaN where a point has nothing. When ``most`` points are
    there, each two become one: the curve keeps its whole length and loses resolution."""

    def __init__(self, most: int = MAX_POINTS) -> None:
        assert most % 2 == 0
        self._most = most
        self._columns: dict[str, array[float]] = {}
        self._length = 0
        self.version = 0

    def __len__(self) -> int:
        return self._length

    def append(self, point: Mapping[str, float]) -> None:
        """Names beyond MAX_NAMES are dropped."""
        for name in point:
            if name not in self._columns and len(self._columns) < MAX_NAMES:
                self._columns[name] = array("d", [math.nan]) * self._length
        for name, column in self._columns.items():
            column.append(point.get(name, math.nan))
        self._length += 1
        self.version += 1
        if self._length >= self._most:
            self._halve()

    def truncate(self, name: str, at_least: float) -> None:
        """Forget the points at the end whose ``name`` is at least this: they are about to come again."""
        column = self._columns.get(name, array("d"))
        while column and column[-1] >= at_least:
            for each in self._columns.values():
                each.pop()
            self._length -= 1
            self.version += 1

    def last(self, name: str) -> float | None:
        column = self._columns.get(name)
        return column[-1] if column and not math.isnan(column[-1]) else None

    def newest(self, name: str) -> float | None:
        """The last value that there is."""
        column = self._columns.get(name, array("d"))
        return next((value for value in reversed(column) if math.isfinite(value)), None)

    @classmethod
    def restored(cls, columns: Mapping[str, list[float | None]]) -> Curves:
        """From what ``columns`` gave. Raises ValueError or TypeError for what it cannot have given."""
        curves = cls()
        lengths = {len(column) for column in columns.values()}
        if len(lengths) > 1 or max(lengths, default=0) > MAX_POINTS or len(columns) > MAX_NAMES:
            raise ValueError("these are not curves")
        for name, column in columns.items():
            curves._columns[name] = array("d", [math.nan if v is None else float(v) for v in column])
        curves._length = curves.version = max(lengths, default=0)
        return curves

    def columns(self) -> dict[str, list[float | None]]:
        """For JSON, which has no NaN."""
        return {
            name: [value if math.isfinite(value) else None for value in column]
            for name, column in self._columns.items()
        }

    def _halve(self) -> None:
        for name, column in self._columns.items():
            pairs = zip(column[0::2], column[1::2], strict=True)
            self._columns[name] = array("d", [_merged(name, first, second) for first, second in pairs])
        self._length //= 2


def _merged(name: str, first: float, second: float) -> float:
    if name in _LAST or math.isnan(first):
        return second
    if math.isnan(second):
        return first
    return first + second if name in _SUMMED else (first + second) / 2


@dataclass(frozen=True, slots=True)
class _Pass:
    metrics: Mapping[str, float]
    tokens: int
    backward: bool


@dataclass(slots=True)
class _Sums:
    """Passes that lie too far back to be known one by one, as one forward and one backward pass. first, last:
    their seq_ids."""

    first: int
    last: int = 0
    passes: dict[bool, _Pass] = field(default_factory=dict)

    def add(self, seq_id: int, one: _Pass) -> None:
        """Names beyond MAX_NAMES are dropped."""
        before = self.passes.get(one.backward, _Pass({}, 0, one.backward))
        metrics = dict(before.metrics)
        for name, value in one.metrics.items():
            if name in metrics or len(metrics) < MAX_NAMES:
                metrics[name] = metrics.get(name, 0.0) + value
        self.passes[one.backward] = _Pass(metrics, before.tokens + one.tokens, one.backward)
        self.last = seq_id


@dataclass
class RunHistory:
    """One run's curves by step, what its program reported by itself, and the passes since the last step:
    the newest by seq_id, all others as sums."""

    steps: Curves = field(default_factory=Curves)
    reported: Curves = field(default_factory=Curves)
    passes: dict[int, _Pass] = field(default_factory=dict)
    sums: _Sums | None = None

    def add_pass(self, seq_id: int, metrics: Mapping[str, float], tokens: int, backward: bool) -> None:
        """metrics: as the client gets them, ``name:sum``. A pass that is done again counts once."""
        if self.sums is not None and seq_id <= self.sums.last:
            if seq_id >= self.sums.first:
                return
            self.sums = None  # all of them are done again after this one
        self.passes[seq_id] = _Pass(dict(metrics), tokens, backward)
        if len(self.passes) > MAX_PASSES:
            oldest = min(self.passes)
            self.sums = self.sums or _Sums(first=oldest)
            self.sums.add(oldest, self.passes.pop(oldest))

    def add_step(self, seq_id: int, time: float, learning_rate: float, metrics: Mapping[str, float]) -> None:
        """A step that was done before (recovery does some again) replaces what came of it then."""
        self.steps.truncate("seq_id", seq_id)
        passes = [each for number, each in self.passes.items() if number < seq_id]
        if self.sums is not None and self.sums.last < seq_id:
            passes += self.sums.passes.values()
        self.passes.clear()
        self.sums = None
        tokens = sum(each.tokens for each in passes)
        point = {
            "seq_id": float(seq_id),
            "step": (self.steps.last("step") or 0.0) + 1,
            "time": time,
            "learning_rate": learning_rate,
            "tokens": float(tokens),
            "total_tokens": (self.steps.last("total_tokens") or 0.0) + tokens,
            **_means_of([each for each in passes if each.backward]),
            **{f"forward_{k}": v for k, v in _means_of([p for p in passes if not p.backward]).items()},
            **{name.partition(":")[0]: value for name, value in metrics.items()},
        }
        self.steps.append(point)

    def report(self, step: float | None, time: float, values: Mapping[str, float]) -> None:
        """``values``: what the run's own program wants to see drawn, for instance its reward."""
        step = (self.steps.last("step") or 0.0) if step is None else step
        self.reported.append({"step": step, "time": time, **values})

    def view(self, curves: bool = True) -> dict[str, Any]:
        """curves: False leaves the long part out."""
        return {
            "version": self.version,
            "num_steps": int(self.steps.last("step") or 0),
            "total_tokens": int(self.steps.last("total_tokens") or 0),
            "loss": self.steps.newest("loss"),
            **(self.state() if curves else {}),
        }

    def state(self) -> dict[str, Any]:
        """What ``restored`` needs. Passes since the last step are not in it: recovery does them again."""
        return {"steps": self.steps.columns(), "reported": self.reported.columns()}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> RunHistory:
        """An empty one if ``state`` makes no sense."""
        try:
            return cls(Curves.restored(state["steps"]), Curves.restored(state["reported"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            return cls()

    @property
    def version(self) -> int:
        """Changes whenever ``view`` does."""
        return self.steps.version + self.reported.version


def _means_of(passes: list[_Pass]) -> dict[str, float]:
    sums = {"": float(sum(each.tokens for each in passes))}
    for each in passes:
        for name, value in each.metrics.items():
            sums[name] = sums.get(name, 0.0) + value
    return means(sums)


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums over tokens as means over the tokens that count. ``sums``: by name, with the number of all
    tokens under the empty name. The loss is there as ``loss``."""
    weight_name = next((name for name in _WEIGHTS if sums.get(name, 0.0) > 0), "")
    weight = sums.get(weight_name, 0.0)
    if weight <= 0:
        return {}
    found = {}
    for name, value in sums.items():
        what, _, reduction = name.partition(":")
        if reduction == "sum" and name not in _WEIGHTS:
            found[what] = value / weight
    return found


class Histories:
    """The histories of all runs; the one that was touched longest ago goes when there are too many, once
    ``changed`` has told what is new in it.

    load: what is known of a run from before, as ``RunHistory.state`` gave it.
    """

    def __init__(self, most: int = MAX_RUNS) -> None:
        self._most = most
        self._runs: OrderedDict[str, RunHistory] = OrderedDict()
        self._saved: dict[str, int] = {}
        self._leaving: dict[str, RunHistory] = {}
        self.load: Callable[[str], Mapping[str, Any] | None] = lambda run_id: None

    def of(self, run_id: str) -> RunHistory:
        history = self._runs.get(run_id)
        if history is None:
            history = self._runs[run_id] = self._returned(run_id) or self._loaded(run_id)
            if len(self._runs) > self._most:
                gone, oldest = self._runs.popitem(last=False)
                if self._saved.pop(gone) != oldest.version:
                    self._leaving[gone] = oldest
        self._runs.move_to_end(run_id)
        return history

    def changed(self) -> list[tuple[str, dict[str, Any]]]:
        """The states of those that have changed since the last call."""
        found = [(run_id, h) for run_id, h in self._runs.items() if h.version != self._saved[run_id]]
        self._saved.update((run_id, history.version) for run_id, history in found)
        found += self._leaving.items()
        self._leaving.clear()
        return [(run_id, history.state()) for run_id, history in found]

    def _returned(self, run_id: str) -> RunHistory | None:
        """One that was to go and is not told yet."""
        history = self._leaving.pop(run_id, None)
        if history is not None:
            self._saved[run_id] = -1
        return history

    def _loaded(self, run_id: str) -> RunHistory:
        state = self.load(run_id)
        history = RunHistory() if state is None else RunHistory.restored(state)
        self._saved[run_id] = history.version
        return history
