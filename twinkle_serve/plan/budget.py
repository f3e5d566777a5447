"""Bytes of one rank, line by line: base model, adapters, KV cache, activations, and what the device keeps.

Knows shapes, settings and how ranks share (the fullest rank is counted). Does not know how it is printed.
Everything but the activations is exact; those are an upper estimate for the largest pass that can come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from twinkle_serve.config import ModelConfig
from twinkle_serve.plan.shapes import ModelShapes

GIB = 2**30
BLOCK_TOKENS = 16  # of the KV cache
USABLE = 0.96
"""Of a device's memory. The allocator cannot use the last gaps."""

_ALIGNMENT = 16
_FLOAT32 = 4
_CUDA_BYTES = 2 * GIB  # context, cuBLAS workspaces, NCCL's buffers
_KEPT_LOGITS_BYTES = 256 * 2**20
_LARGEST_PACKED_BYTES = 2 * GIB
_SMALLEST_PACKED_SIDE = 256
_IMBALANCE = 2  # tokens that the busiest rank's experts get, by what is fair


@dataclass(frozen=True, slots=True)
class Line:
    """``arithmetic`` is the product that ``num_bytes`` is the value of, in words that can be recalculated."""

    part: str
    what: str
    arithmetic: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Budget:
    """One rank of ``config``. limit: bytes that may be used, None where no device memory is stated."""

    config: ModelConfig
    shapes: ModelShapes
    lines: tuple[Line, ...]
    host_lines: tuple[Line, ...]
    limit: int | None

    @property
    def num_bytes(self) -> int:
        return sum(line.num_bytes for line in self.lines)

    @property
    def fits(self) -> bool:
        return self.limit is None or self.num_bytes <= self.limit

    def part(self, part: str) -> int:
        return sum(line.num_bytes for line in self.lines if line.part == part)


def budget_of(config: ModelConfig, shapes: ModelShapes) -> Budget:
    """Raises ValueError for settings that no memory can help."""
    ranks = config.ranks
    # One rank shares nothing, whatever the configuration says.
    if (
        ranks > 1
        and config.sharding == "expert_parallel"
        and (not shapes.num_experts or shapes.num_experts % ranks)
    ):
        raise ValueError(
            f"{config.name}: {shapes.num_experts} experts cannot be shared evenly by {ranks} ranks"
        )
    rank = _Rank(config, shapes)
    lines = (
        *rank.base(),
        *rank.packed(),
        *rank.slots(),
        *rank.sampling(),
        *rank.activations(),
        *rank.device(),
    )
    stated = config.gpu_memory_bytes
    limit = None if stated is None else int(stated * USABLE)
    return Budget(config, shapes, lines, tuple(rank.host()), limit)


class _Rank:
    """The arithmetic of one rank; each method yields the lines of one part."""

    def __init__(self, config: ModelConfig, shapes: ModelShapes) -> None:
        self._config = config
        self._shapes = shapes
        self._ranks = config.ranks
        no_gpu = config.device == "auto" and config.gpu_memory_bytes is None
        self._on_cpu = config.device == "cpu" or no_gpu
        is_float32 = config.dtype == "float32" or (config.dtype == "auto" and self._on_cpu)
        self._width = _FLOAT32 if is_float32 else 2
        # Where experts are split, each rank has a part of them; under zero3 a part of everything.
        self._experts_over = self._ranks if config.sharding == "expert_parallel" else 1
        self._num_experts = shapes.num_experts // self._experts_over
        self._all_over = self._ranks if config.sharding == "zero3" and self._ranks > 1 else 1

    # weights --------------------------------------------------------------------------------------

    def base(self) -> Iterator[Line]:
        s, width = self._shapes, self._width

        def line(what: str, arithmetic: str, num_floats: int, over: int = self._all_over) -> Line:
            share = f" / {over} ranks" if over > 1 else ""
            return Line("base", what, f"{arithmetic} x {width} B{share}", -(-num_floats * width // over))

        # Whole on every rank, whatever the sharding.
        for what in ("embedding",) if s.is_tied else ("embedding", "unembedding"):
            yield line(what, f"{s.vocab_size:,} x {s.hidden:,}", s.vocab_size * s.hidden, over=1)
        per_layer = (
            f"(2 x {s.hidden:,} x {s.query_width:,} + 2 x {s.hidden:,} x {s.kv_width:,} + {s.bias_size:,})"
        )
        yield line("attention", f"{s.num_layers} x {per_layer}", s.num_layers * s.attention_size)
        norms = s.num_layers * s.norm_size + s.hidden
        yield line("norms", f"({s.num_layers} x {s.norm_size:,} + {s.hidden:,})", norms)
        num_dense = s.num_layers - s.num_sparse_layers
        if num_dense:
            yield line(
                "mlp", f"{num_dense} x 3 x {s.hidden:,} x {s.inner:,}", num_dense * 3 * s.hidden * s.inner
            )
        if s.num_experts:
            count = self._num_experts
            router = s.num_sparse_layers * s.num_experts * s.hidden
            yield line("router", f"{s.num_sparse_layers} x {s.num_experts} x {s.hidden:,}", router)
            yield line(
                "experts",
                f"{s.num_sparse_layers} x {count} experts x 3 x {s.hidden:,} x {s.expert_inner:,}",
                s.num_sparse_layers * count * 3 * s.hidden * s.expert_inner,
            )
        if self._all_over > 1:
            # One layer is used while the next is fetched, and a layer is whole while it is used.
            largest = s.attention_size + s.norm_size + (s.experts_size or 3 * s.hidden * s.inner)
            yield Line("base", "gathered layers", f"2 x {largest:,} x {width} B", 2 * largest * width)

    def packed(self) -> Iterator[Line]:
        """On a CPU weights are kept in its kernels' own layouts as well, one forward and one backward."""
        c, s = self._config, self._shapes
        if not self._on_cpu or self._width != _FLOAT32 or self._all_over > 1 or c.pack_weights == "off":
            return
        whole = sum(line.num_bytes for line in self.base())
        if c.pack_weights == "auto" and whole > _LARGEST_PACKED_BYTES:
            return
        sizes = [
            (rows, columns, times)
            for rows, columns, times in s.matrices(self._num_experts)
            if times and min(rows, columns) >= _SMALLEST_PACKED_SIDE
        ]
        if sizes:
            products = " + ".join(f"{times} x {rows:,} x {columns:,}" for rows, columns, times in sizes)
            total = sum(rows * columns * times for rows, columns, times in sizes)
            yield Line("packed", "in the kernels' layouts", f"2 x ({products}) x 4 B", 2 * total * _FLOAT32)

    # adapters -------------------------------------------------------------------------------------

    @property
    def row_size(self) -> int:
        """Floats of an adapter for each of its ranks, padding included."""
        s = self._shapes
        return sum(_aligned(width) * times for width, times in s.factors(self._num_experts))

    def slots(self) -> Iterator[Line]:
        c, row = self._config, self.row_size
        num_floats = c.max_resident_adapters * c.max_rank * row
        shape = f"{c.max_resident_adapters} slots x rank {c.max_rank} x {row:,}"
        yield Line("slots", "weights", f"{shape} x 4 B", num_floats * _FLOAT32)
        if self._width != _FLOAT32:
            yield Line("slots", "weights to multiply with", f"{shape} x 2 B", num_floats * 2)
        yield Line("gradients", "accumulated", f"{shape} x 4 B", num_floats * _FLOAT32)
        yield Line("gradients", "before the tick, to take a failure back", f"{shape} x 4 B", num_floats * 4)
        yield Line("adam", "both moments", f"2 x {shape} x 4 B", 2 * num_floats * _FLOAT32)

    def sampling(self) -> Iterator[Line]:
        c, s, row = self._config, self._shapes, self.row_size
        num_floats = c.sampler.adapter_slots * c.max_rank * row
        shape = f"{c.sampler.adapter_slots} snapshots x rank {c.max_rank} x {row:,}"
        yield Line("sampling", "adapters", f"{shape} x 4 B", num_floats * _FLOAT32)
        if self._width != _FLOAT32:
            yield Line("sampling", "adapters to multiply with", f"{shape} x 2 B", num_floats * 2)
        # Each rank decodes its own requests.
        own = c.sampler.kv_cache_tokens // self._ranks
        num_rows = max(1, own // BLOCK_TOKENS) * BLOCK_TOKENS
        yield Line(
            "kv",
            "keys and values",
            f"{s.num_layers} x 2 x {num_rows:,} tokens x {s.kv_width:,} x {self._width} B",
            s.num_layers * 2 * num_rows * s.kv_width * self._width,
        )

    # work -----------------------------------------------------------------------------------------

    @property
    def _context(self) -> int:
        longest = self._shapes.context
        return min(longest, self._config.max_context_length or longest)

    @property
    def _tokens(self) -> int:
        """Of the largest pass, on one rank: its part of a microbatch, or one sequence, which is not cut."""
        return max(-(-self._config.microbatch_tokens // self._ranks), self._context)

    @property
    def _pairs(self) -> int:
        """Pairs of a token and an expert that this rank computes in the largest pass."""
        tokens, s = max(self._config.microbatch_tokens, self._context), self._shapes
        over = self._experts_over
        return (
            tokens * s.experts_per_token
            if over == 1
            else -(-tokens * s.experts_per_token * _IMBALANCE // over)
        )

    def activations(self) -> Iterator[Line]:
        c, s, width, tokens, pairs = self._config, self._shapes, self._width, self._tokens, self._pairs
        inner = s.expert_inner if s.num_sparse_layers else 0
        dense = s.inner if s.num_layers > s.num_sparse_layers else 0
        a_token = 4 * s.hidden + 3 * s.query_width + 3 * s.kv_width + 4 * s.num_experts + 4 * dense
        a_pair = 2 * inner
        arithmetic = f"({tokens:,} tokens x {a_token:,} + {pairs:,} pairs x {a_pair:,}) x {width} B"
        layer = (tokens * a_token + pairs * a_pair) * width
        if c.activation_checkpointing:
            edges = s.num_layers * tokens * s.hidden * width
            shape = f"{s.num_layers} x {tokens:,} tokens x {s.hidden:,} x {width} B"
            yield Line("activations", "between layers", shape, edges)
            yield Line("activations", "of one layer", arithmetic, layer)
        else:
            yield Line("activations", "of all layers", f"{s.num_layers} x {arithmetic}", s.num_layers * layer)
        gathered = tokens * self._experts_over
        work = (2 * gathered * s.hidden + 2 * tokens * s.hidden + pairs * (2 * s.hidden + 6 * inner)) * width
        yield Line(
            "activations",
            "of the layer at work",
            f"({2 * gathered + 2 * tokens:,} rows x {s.hidden:,} + {pairs:,} pairs x "
            f"{2 * s.hidden + 6 * inner:,}) x {width} B",
            work,
        )
        chunk = min(c.logits_chunk_tokens, tokens)
        yield Line(
            "activations",
            "logits",
            f"2 x {chunk} x {s.vocab_size:,} x 4 B",
            2 * chunk * s.vocab_size * _FLOAT32,
        )
        yield Line("activations", "logits kept for backward", f"{_KEPT_LOGITS_BYTES:,} B", _KEPT_LOGITS_BYTES)

    def device(self) -> Iterator[Line]:
        if not self._on_cpu:
            yield Line("device", "CUDA context, cuBLAS, NCCL", f"{_CUDA_BYTES:,} B", _CUDA_BYTES)

    def host(self) -> Iterator[Line]:
        """In the host's memory, for each rank."""
        size = self._config.host_page_bytes
        yield Line("host", "paged adapters", f"{size:,} B", size)
        yield Line("host", "sampling snapshots", f"{size:,} B", size)


def _aligned(width: int) -> int:
    return -(-width // _ALIGNMENT) * _ALIGNMENT
