"""What the coordinator asks a group of ranks to do in one tick, and what comes back.

Every rank gets the same Tick and walks its fields in the order they are declared. Knows slots and request
ids. Does not know tenants, ordering (control/) or how anything is computed (engine/).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from twinkle_serve.protocol.data import AdamParams, LoraSpec, SampleDelta, SampleRequest


@dataclass(frozen=True, slots=True)
class PageOut:
    """Move the run in ``slot`` (weights, gradients, moments) to the group's host store; scrub the slot."""

    slot: int
    run_id: str


@dataclass(frozen=True, slots=True)
class PageIn:
    """Bring a run that was paged out back, into ``slot``."""

    slot: int
    run_id: str


@dataclass(frozen=True, slots=True)
class CreateAdapter:
    """Give a fresh run its seeded adapter in ``slot``. Answers None."""

    request_id: str
    run_id: str
    slot: int
    spec: LoraSpec


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Replace the adapter in ``slot`` by the checkpoint at ``directory``; ``optimizer`` also restores
    the moments, otherwise they and the gradients start at zero. Answers None."""

    request_id: str
    run_id: str
    slot: int
    directory: str
    optimizer: bool


@dataclass(frozen=True, slots=True)
class RestoreRun:
    """Put the run that PersistRun wrote to the file ``path`` into the free ``slot``, exactly as it was.
    Answers None. A failure of category "server" says nothing about the file: it may be restored later."""

    request_id: str
    run_id: str
    slot: int
    path: str


@dataclass(frozen=True, slots=True)
class PersistRun:
    """Write the whole run (weights, gradients, moments) to the new file ``path``: as it is at the end of
    this tick, from ``slot`` or (None) from where it was paged out to. Answers the size in bytes, in this
    tick or a later one, once the file is whole and on disk."""

    request_id: str
    run_id: str
    slot: int | None
    path: str


@dataclass(frozen=True, slots=True)
class DropRun:
    """Forget a run: scrub its slot (None when it is paged out) and its paged copy."""

    run_id: str
    slot: int | None


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward or forward_backward request. ``datums`` is DatumBatch.pack(); answers ForwardResult."""

    request_id: str
    slot: int
    datums: bytes
    loss_fn: str
    loss_config: Mapping[str, float | str]
    backward: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """Some datums of one pass: ``indices`` into the datums of ``Tick.passes[pass_index]``, ascending."""

    pass_index: int
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OptimStep:
    """One AdamW step on the gradients of ``slot``, which are then zero. Answers dict[str, float]."""

    request_id: str
    slot: int
    params: AdamParams


@dataclass(frozen=True, slots=True)
class SaveAdapter:
    """Write the adapter in ``slot`` as a checkpoint at ``directory`` (atomically), with the optimizer
    state if asked. ``manifest`` goes into its manifest file. Answers the size in bytes (int)."""

    request_id: str
    slot: int
    directory: str
    optimizer: bool
    manifest: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Freeze the adapter in ``slot`` for sampling under the name ``adapter``. Answers None.

    ``path``: also write it to that file, in the background; before any later PersistRun of the run.
    """

    request_id: str
    slot: int
    adapter: str
    path: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """The weights to sample with, known under ``adapter``: a snapshot in the group's memory, or what lies
    at ``directory``: a checkpoint, or the file that a snapshot was written to."""

    adapter: str
    directory: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """Admit one sampling request; ``adapter`` None is the base model alone. ``tenant`` bounds the
    sharing of prompt prefixes. Answers SampleResult, in this tick or a later one; ``stream`` asks for
    Progress before it."""

    request_id: str
    tenant: str
    adapter: AdapterRef | None
    request: SampleRequest
    stream: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """One round of work. Each rank walks the fields top to bottom; an error in one item is that item's
    outcome and does not stop the others.

    microbatches: pieces of ``passes`` that run together; every datum of every pass is in exactly one.
    decode_budget_s: how long to go on decoding admitted samples before returning, seconds; with
    nothing admitted it costs nothing. At least one step runs when the budget is above zero.
    """

    tick_id: int
    page_out: tuple[PageOut, ...] = ()
    drops: tuple[DropRun, ...] = ()
    page_in: tuple[PageIn, ...] = ()
    restores: tuple[RestoreRun, ...] = ()
    creates: tuple[CreateAdapter, ...] = ()
    loads: tuple[LoadAdapter, ...] = ()
    passes: tuple[Pass, ...] = ()
    microbatches: tuple[tuple[Piece, ...], ...] = ()
    optim_steps: tuple[OptimStep, ...] = ()
    saves: tuple[SaveAdapter, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    persists: tuple[PersistRun, ...] = ()
    drop_snapshots: tuple[str, ...] = ()
    cancels: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = ()
    decode_budget_s: float = 0.0


MAX_MESSAGE = 2000
"""Characters of a failure: it is written down and kept for as long as a result."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request failed. ``category`` is "user" for bad input, "server" for our fault."""

    message: str
    category: str = "user"

    def __post_init__(self) -> None:
        if len(self.message) > MAX_MESSAGE:
            object.__setattr__(self, "message", self.message[:MAX_MESSAGE])


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer to one request of a tick: ``value`` or ``failure``. metrics: the numbers in a value that
    stays with the rank's process and is only referred to. num_bytes: about what the value takes."""

    request_id: str
    value: Any = None
    failure: Failure | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """What a streamed sample has drawn since its last Progress. Its Outcome still holds all of it."""

    request_id: str
    deltas: tuple[SampleDelta, ...]


@dataclass(frozen=True, slots=True)
class TickReport:
    """What a tick ends with: its cost by phase in seconds, and whether samples are still decoding."""

    tick_id: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    active_samples: int = 0
    gauges: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded base model tells the control plane.

    tokenizer_id: what clients pass to AutoTokenizer: a hub id, or the absolute local directory.
    max_slots: adapters resident at once. eos_token_ids: what stops a sample by default.
    active_parameters: weights that one token is multiplied with. peak_flops: what one rank's device can do
    in the base model's dtype, floating point operations a second; 0 where it is not known.
    """

    name: str
    arch: str
    tokenizer_id: str
    vocab_size: int
    max_context_length: int
    max_rank: int
    max_slots: int
    eos_token_ids: tuple[int, ...]
    active_parameters: int = 0
    peak_flops: float = 0.0
