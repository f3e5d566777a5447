"""Part of ``make bench-engine``: what it costs to step many tenants together, and one tenant alone.

Arms of one row are interleaved in one process on one thread: our batched step, our own step tenant by tenant,
and a plain torch + PEFT loop on the same weights. A step is forward, backward and AdamW with rank-8 LoRA on
attention, experts and unembedding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from benchmarks.common import Report, interleave
from benchmarks.table import reaches
from twinkle_serve.config import ModelConfig
from twinkle_serve.control.microbatches import Load, pack
from twinkle_serve.engine.engine import Engine
from twinkle_serve.protocol.data import AdamParams, Column, DatumBatch, LoraSpec
from twinkle_serve.protocol.work import CreateAdapter, OptimStep, Pass, Tick
from twinkle_serve.testing.models import build_bench_moe, build_sparse_moe, build_tiny_qwen3_moe

RANK = 8
DATUM_TOKENS = 64
SECONDS = 5.0
"""A row takes at least this long."""
MICROBATCH_TOKENS = ModelConfig.model_fields["microbatch_tokens"].default
FROZEN = "_linear_pointwise"
"""The product with a frozen weight in oneDNN's layout, in a profile."""
BATCHED_TARGETS = {(64, 4): ">= 1.7", (64, 8): ">= 2.1", (64, 16): ">= 2.3"}


class Tenants:
    """An engine with ``count`` runs, and a batch of ``tokens`` tokens for each."""

    def __init__(self, directory: Path, count: int) -> None:
        self.engine = Engine(
            ModelConfig(name="bench", path=str(directory), num_threads=1, max_resident_adapters=count)
        )
        creates = tuple(
            CreateAdapter(f"create-{slot}", f"run-{slot}", slot, LoraSpec(RANK, seed=slot))
            for slot in range(count)
        )
        list(self.engine.run(Tick(0, creates=creates)))
        self._generator = np.random.default_rng(0)

    def batch(self, tokens: int) -> DatumBatch:
        lengths = np.full(max(1, tokens // DATUM_TOKENS), min(tokens, DATUM_TOKENS))
        total = int(lengths.sum())
        vocabulary = self.engine.info.vocab_size
        widths = np.zeros(len(lengths), np.int32)
        draw = self._generator
        return DatumBatch(
            draw.integers(0, vocabulary, total).astype(np.int32),
            lengths,
            {
                "target_tokens": Column(draw.integers(0, vocabulary, total), widths),
                "weights": Column(np.ones(total, np.float32), widths),
            },
        )

    def step(self, slots: list[int], batches: list[DatumBatch], deterministic: bool = False) -> None:
        """One tick: passes and optimizer steps of all ``slots``. deterministic: microbatches as that mode
        makes them, where requests do not share one."""
        passes = tuple(
            Pass(f"pass-{slot}", slot, batches[slot].pack(), "cross_entropy", {}, True) for slot in slots
        )
        loads = [Load(slot, True, tuple(batches[slot].lengths.tolist())) for slot in slots]
        steps = tuple(OptimStep(f"step-{slot}", slot, AdamParams()) for slot in slots)
        microbatches = pack(loads, MICROBATCH_TOKENS, deterministic)
        outcomes = list(self.engine.run(Tick(1, passes=passes, microbatches=microbatches, optim_steps=steps)))
        assert all(getattr(outcome, "failure", None) is None for outcome in outcomes)


def peft_step(directory: Path) -> Callable[[DatumBatch], None]:
    """The same step as a researcher writes it: PEFT on a plain model, a padded (here: even) batch."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = LoraConfig(
        r=RANK,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    peft = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-4)

    def step(batch: DatumBatch) -> None:
        shape = (batch.num_datums, -1)
        inputs = torch.from_numpy(batch.tokens.astype(np.int64)).view(shape)
        targets = torch.from_numpy(np.array(batch.columns["target_tokens"].values)).view(-1)
        logits = peft(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(report: Report, name: str, directory: Path, counts: list[int], sizes: list[int]) -> None:
    tenants = Tenants(directory, max(counts))
    bare = peft_step(directory)
    for tokens in sizes:
        batches = [tenants.batch(tokens) for _ in range(max(counts))]
        for count in counts:
            _measure_one(report, f"{name}: {count} x {tokens} tokens", tenants, bare, batches[:count])


def _measure_one(
    report: Report,
    label: str,
    tenants: Tenants,
    bare: Callable[[DatumBatch], None],
    batches: list[DatumBatch],
) -> None:
    count, tokens = len(batches), batches[0].num_tokens
    slots = list(range(count))
    arms = {
        "batched": lambda: tenants.step(slots, batches),
        "one by one": lambda: [tenants.step([slot], batches) for slot in slots],
        "deterministic": lambda: tenants.step(slots, batches, deterministic=True),
        "peft": lambda: [bare(batch) for batch in batches],
    }
    rounds = 5 if tokens * count <= 4096 else 2
    times = interleave(arms, rounds, warmup=0, settle=True, seconds=SECONDS)
    batched, alone, peft = times["batched"], times["one by one"], times["peft"]
    aim = BATCHED_TARGETS.get((tokens, count), ">= 1.0" if count > 1 else "")
    found = alone.cpu / batched.cpu
    why = _why(found, aim, arms, "one by one")
    report.row(f"{label}, batched over one by one", found, aim, timings=times, why=why)
    if count > 1:
        cost = times["deterministic"].cpu / batched.cpu
        report.row(f"{label}, deterministic mode costs (times batched)", cost)
    aim = ">= 0.95" if count == 1 else ">= 6" if (tokens, count) == (64, 8) else ""
    found = peft.cpu / batched.cpu
    why = _why(found, aim, arms, "peft")
    report.row(f"{label}, batched over torch + PEFT", found, aim, why=why)


def _why(found: float, aim: str, arms: Mapping[str, Callable[[], object]], other: str) -> str:
    """From a profile of both arms, for a ratio that misses its aim: where the time is, and the ratio that
    would be left if all but the frozen weights' products cost nothing."""
    if not aim or reaches(found, aim):
        return ""
    profiles = {name: _profile(arms[name]) for name in ("batched", other)}
    parts = [f"{name}: {_operators(events)}" for name, events in profiles.items()]
    batched, alone = (_self_ms(events, FROZEN) for events in profiles.values())
    if alone:  # torch + PEFT has its frozen weights in another layout
        parts.append(f"the frozen weights' products by themselves: {alone / batched:.2f}")
    return "; ".join(parts)


def _profile(arm: Callable[[], object]) -> list[Any]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        arm()
    return sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)


def _self_ms(events: Iterable[Any], name: str = "") -> float:
    return sum(event.self_cpu_time_total for event in events if name in event.key) / 1000


def _operators(events: Sequence[Any], most: int = 5) -> str:
    """The operators that take most of the time, in ms with the profiler's own cost, and how often they are
    called."""
    largest = [
        f"{event.key.rpartition('::')[2]} {event.self_cpu_time_total / 1000:.0f} ({event.count})"
        for event in events[:most]
    ]
    return f"{', '.join(largest)} of {_self_ms(events):.0f} ms"


def models(root: Path) -> dict[str, Path]:
    return {
        "tiny MoE": build_tiny_qwen3_moe(root, vocab_size=350),
        "49M MoE": build_bench_moe(root),
        "52M MoE of 64 experts": build_sparse_moe(root),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("engine")
    for name, directory in models(arguments.models).items():
        measure(report, name, directory, arguments.counts, arguments.tokens)
    report.write()


if __name__ == "__main__":
    main()
