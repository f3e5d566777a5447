"""``make bench-sampling``: tokens a second of the sampler, beside ``transformers.generate`` on equal weights.

Arms of one row are interleaved in one process on one thread, and ratios are of CPU time, which other users of
the machine disturb least. Ours reports the logprob of every token; generate is not asked to.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import Report, Timing, interleave
from twinkle_serve.config import ModelConfig
from twinkle_serve.engine.engine import Engine
from twinkle_serve.protocol.data import LoraSpec, SampleRequest, SamplingParams
from twinkle_serve.protocol.work import AdapterRef, CreateAdapter, Outcome, Sample, Snapshot, Tick, TickReport
from twinkle_serve.testing.models import build_bench_moe, build_tiny_qwen3_moe

FOREVER_S = 3600.0
ONE_STEP_S = 1e-9
PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt of so many tokens, so many to draw (nothing stops them earlier), and when it arrives: after
    so many decode steps."""

    prompt_tokens: int
    new_tokens: int
    arrives: int = 0
    num_samples: int = 1
    adapter: str | None = None


def step_by_step(asks: Sequence[Ask], step: Callable[[Sequence[Ask], float], int]) -> None:
    """Serve ``asks``, each from the decode step on at which it arrives. step: admits some, decodes for so
    many seconds, at least one step, and returns how many are still active. Where nothing is active the clock
    goes on to the next arrival."""
    waiting = sorted(asks, key=lambda ask: ask.arrives)
    clock, active = 0, 0
    while waiting or active:
        if waiting and not active:
            clock = max(clock, waiting[0].arrives)
        due = [ask for ask in waiting if ask.arrives <= clock]
        waiting = waiting[len(due) :]
        active = step(due, ONE_STEP_S if waiting else FOREVER_S)
        clock += 1


def call_by_call(asks: Sequence[Ask], call: Callable[[Sequence[Ask]], object]) -> None:
    """The same by calls that each take a batch and as many steps of the same clock as its longest answer."""
    waiting, clock = sorted(asks, key=lambda ask: ask.arrives), 0
    while waiting:
        clock = max(clock, waiting[0].arrives)
        batch = [ask for ask in waiting if ask.arrives <= clock]
        waiting = waiting[len(batch) :]
        call(batch)
        clock += max(ask.new_tokens for ask in batch)


class Ours:
    """Our engine with 8 frozen adapters, of rank 8."""

    def __init__(self, directory: Path) -> None:
        config = ModelConfig(name="bench", path=str(directory), num_threads=1, max_resident_adapters=8)
        self._engine = Engine(config)
        creates = tuple(CreateAdapter(f"c{i}", f"run{i}", i, LoraSpec(8, seed=i)) for i in range(8))
        freezes = tuple(Snapshot(f"s{i}", i, f"adapter{i}") for i in range(8))
        list(self._engine.run(Tick(0, creates=creates, snapshots=freezes)))
        self._numbers = itertools.count(1)
        self._prompts = np.random.default_rng(0)

    def run(self, asks: Sequence[Ask]) -> None:
        """All of them, each admitted when it arrives. Every call is a tenant of its own, so that no prefix is
        known from the last one."""
        number, names = next(self._numbers), itertools.count()

        def step(due: Sequence[Ask], budget_s: float) -> int:
            samples = tuple(self._sample(ask, f"{number}-{next(names)}", str(number)) for ask in due)
            active = 0
            for item in self._engine.run(Tick(number, samples=samples, decode_budget_s=budget_s)):
                if isinstance(item, TickReport):
                    active = item.active_samples
                elif isinstance(item, Outcome):
                    assert item.failure is None, item.failure
            return active

        step_by_step(asks, step)

    def _sample(self, ask: Ask, request_id: str, tenant: str) -> Sample:
        prompt = self._prompts.integers(0, self._engine.info.vocab_size, ask.prompt_tokens).astype(np.int32)
        request = SampleRequest(prompt, SamplingParams(max_tokens=ask.new_tokens, seed=1), ask.num_samples)
        adapter = None if ask.adapter is None else AdapterRef(ask.adapter)
        return Sample(request_id, tenant, adapter, request)


class Generate:
    """A program around generate: whatever has arrived when the last call ended is padded to one batch."""

    def __init__(self, directory: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def run(self, asks: Sequence[Ask]) -> None:
        call_by_call(asks, self._call)

    def _call(self, batch: Sequence[Ask]) -> None:
        width, count = max(ask.prompt_tokens for ask in batch), max(ask.new_tokens for ask in batch)
        mask = torch.tensor([[0] * (width - a.prompt_tokens) + [1] * a.prompt_tokens for a in batch])
        tokens = torch.randint(0, self._model.config.vocab_size, mask.shape)
        with torch.no_grad():
            self._model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=True,
                top_k=0,
            )


def mixed(count: int, seed: int = 0) -> list[Ask]:
    """Requests of many lengths, four at a time, 16 steps apart."""
    rng = np.random.default_rng(seed)
    return [
        Ask(int(rng.integers(8, 64)), int(rng.choice([8, 16, 32, 128])), 16 * (number // 4))
        for number in range(count)
    ]


def tokens_of(asks: Sequence[Ask]) -> int:
    return sum(ask.new_tokens * ask.num_samples for ask in asks)


def versus(
    report: Report, label: str, target: str, asks: Sequence[Ask], ours: Ours, other: Generate, rounds: int
) -> None:
    arms: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.run(asks),
        "generate": lambda: other.run(asks),
    }
    times = interleave(arms, rounds)
    tell(report, f"{label}, over generate", times["generate"], times["ours"], target, times, tokens_of(asks))


def tell(
    report: Report,
    label: str,
    slower: Timing,
    faster: Timing,
    target: str,
    times: dict[str, Timing],
    num_tokens: int,
) -> None:
    report.row(label, slower.cpu / faster.cpu, target, times)
    print(
        f"    {num_tokens / faster.cpu:,.0f} tokens a CPU second, "
        f"{num_tokens / faster.wall:,.0f} by the clock"
    )


def measure(report: Report, name: str, directory: Path, new_tokens: int, rounds: int) -> None:
    ours, other = Ours(directory), Generate(directory)
    for batch, target in ((1, ">= 0.95"), (8, ">= 0.95"), (32, ">= 0.95")):
        asks = [Ask(PROMPT_TOKENS, new_tokens)] * batch
        versus(report, f"{name}: batch {batch}", target, asks, ours, other, rounds)
    label = f"{name}: staggered, mixed lengths"
    versus(report, label, ">= 2", mixed(24), ours, other, rounds)

    one = [Ask(PROMPT_TOKENS, new_tokens, adapter="adapter0")] * 16
    many = [Ask(PROMPT_TOKENS, new_tokens, adapter=f"adapter{i % 8}") for i in range(16)]
    times = interleave({"one": lambda: ours.run(one), "eight": lambda: ours.run(many)}, rounds)
    tell(report, f"{name}: 8 adapters over 1", times["one"], times["eight"], ">= 0.8", times, tokens_of(many))

    apart = [Ask(512, 2)] * 16
    shared = [Ask(512, 2, num_samples=16)]
    times = interleave({"apart": lambda: ours.run(apart), "shared": lambda: ours.run(shared)}, rounds)
    label = f"{name}: 16 samples of one prompt, over 16 prompts"
    tell(report, label, times["apart"], times["shared"], ">= 8", times, tokens_of(shared))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--sizes", nargs="+", choices=["tiny", "49M"], default=["tiny", "49M"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="drawn by each request of equal lengths")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("sampling")
    if "tiny" in arguments.sizes:
        tiny = build_tiny_qwen3_moe(arguments.models, vocab_size=350)
        measure(report, "tiny MoE", tiny, arguments.tokens, arguments.rounds)
    if "49M" in arguments.sizes:
        moe = build_bench_moe(arguments.models)
        measure(report, "49M MoE", moe, arguments.tokens, arguments.rounds)
    report.write()


if __name__ == "__main__":
    main()
