"""``python -m benchmarks.gpu``: the engine on one GPU, in bfloat16, on some of Qwen3-30B-A3B's layers.

The ceilings (a large copy, a large matrix product) are measured in the same run, and MFU is against that
product. Weights are random, so routing is close to even: trained routers are less kind.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import Report, Timing
from twinkle_serve.control.microbatches import Load, pack
from twinkle_serve.engine.attention import PackedCausal
from twinkle_serve.engine.engine import Engine
from twinkle_serve.model_config import ModelConfig, SamplerConfig
from twinkle_serve.protocol.data import (
    AdamParams,
    Column,
    DatumBatch,
    LoraSpec,
    SampleRequest,
    SamplingParams,
)
from twinkle_serve.protocol.work import (
    AdapterRef,
    CreateAdapter,
    OptimStep,
    Outcome,
    Pass,
    Sample,
    Snapshot,
    Tick,
)
from twinkle_serve.testing.real_shapes import qwen3_30b_config

PROMPT_TOKENS = 128


def build(root: Path, num_layers: int, device: str = "cuda") -> Path:
    """Random weights in the shapes of Qwen3-30B-A3B, ``num_layers`` of its 48 layers: the directory, built if
    it is not there. It gets its name once it is whole."""
    directory = root / f"{num_layers}-layers"
    if directory.is_dir():
        return directory
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(qwen3_30b_config(num_layers), dtype=torch.bfloat16)
    unfinished = root / f"{num_layers}-layers.unfinished"
    model.save_pretrained(unfinished, max_shard_size="4GB")
    return unfinished.rename(directory)


class Work:
    """An engine with ``count`` runs of one rank."""

    def __init__(self, directory: Path, count: int, rank: int, microbatch_tokens: int) -> None:
        config = ModelConfig(
            name="bench",
            path=str(directory),
            device="cuda",
            max_resident_adapters=count,
            max_rank=rank,
            microbatch_tokens=microbatch_tokens,
            logits_chunk_tokens=2048,
            sampler=SamplerConfig(max_batch=64, kv_cache_tokens=65_536),
        )
        self.engine = Engine(config)
        self.count = count
        specs = [LoraSpec(rank, seed=slot) for slot in range(count)]
        creates = tuple(CreateAdapter(f"c{slot}", f"r{slot}", slot, s) for slot, s in enumerate(specs))
        freeze = (Snapshot("s0", 0, "adapter0"), Snapshot("s1", min(1, count - 1), "adapter1"))
        outcomes = list(self.engine.run(Tick(0, creates=creates, snapshots=freeze)))
        assert all(getattr(outcome, "failure", None) is None for outcome in outcomes), outcomes
        self._budget = microbatch_tokens
        self._draw = np.random.default_rng(0)
        self._number = 1

    def batch(self, tokens: int, datum_tokens: int) -> DatumBatch:
        lengths = np.full(max(1, tokens // datum_tokens), min(tokens, datum_tokens))
        total, vocabulary = int(lengths.sum()), self.engine.info.vocab_size
        widths = np.zeros(len(lengths), np.int32)
        columns = {
            "target_tokens": Column(self._draw.integers(0, vocabulary, total), widths),
            "weights": Column(np.ones(total, np.float32), widths),
        }
        return DatumBatch(self._draw.integers(0, vocabulary, total).astype(np.int32), lengths, columns)

    def step(self, slots: list[int], batches: list[DatumBatch], backward: bool = True) -> None:
        passes = tuple(
            Pass(f"p{slot}", slot, batches[slot].pack(), "cross_entropy", {}, backward) for slot in slots
        )
        loads = [Load(slot, backward, tuple(batches[slot].lengths.tolist())) for slot in slots]
        steps = tuple(OptimStep(f"o{slot}", slot, AdamParams()) for slot in slots if backward)
        tick = Tick(1, passes=passes, microbatches=pack(loads, self._budget, False), optim_steps=steps)
        for outcome in self.engine.run(tick):
            assert getattr(outcome, "failure", None) is None, outcome

    def sample(self, batch: int, new_tokens: int, adapters: tuple[str | None, ...]) -> None:
        self._number += 1
        vocabulary = self.engine.info.vocab_size
        samples = []
        for index in range(batch):
            prompt = self._draw.integers(0, vocabulary, PROMPT_TOKENS).astype(np.int32)
            name = adapters[index % len(adapters)]
            request = SampleRequest(prompt, SamplingParams(max_tokens=new_tokens, seed=1), 1)
            reference = None if name is None else AdapterRef(name)
            samples.append(Sample(f"{self._number}-{index}", str(self._number), reference, request))
        for item in self.engine.run(Tick(self._number, samples=tuple(samples), decode_budget_s=3600.0)):
            assert not isinstance(item, Outcome) or item.failure is None, item

    def base_only(self, batch: DatumBatch) -> None:
        """Forward and backward through the base model without any LoRA: what the frozen model alone costs."""
        base = self.engine.base
        base.segments.set({})
        lengths = batch.lengths.tolist()
        positions = torch.cat([torch.arange(n) for n in lengths]).cuda()
        tokens = torch.from_numpy(batch.tokens.astype(np.int64)).cuda()
        targets = torch.from_numpy(np.array(batch.columns["target_tokens"].values)).long()
        hidden = base.hidden_states(tokens, positions, PackedCausal(lengths))
        logprobs = base.target_logprobs(hidden, [], torch.arange(tokens.numel()), targets)
        logprobs.sum().backward()


def timed(arms: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Median seconds of each arm with the device drained before and after, arms in turn."""
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(warmup + rounds):
        for name, arm in arms.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            arm()
            torch.cuda.synchronize()
            if turn >= warmup:
                samples[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(times), 0.0) for name, times in samples.items()}


def ceilings(report: Report) -> float:
    """Measured bytes a second of a copy, and FLOP a second of a bfloat16 product; returns the latter."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = timed({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 10)
    report.row("copy, TB/s read and written", 2 * source.numel() / times["copy"].wall / 1e12)
    peak = 2 * 8192**3 / times["product"].wall
    report.row("bfloat16 product of 8,192, TFLOP/s", peak / 1e12)
    return peak


def flops(engine: Engine, tokens: int, datum_tokens: int, rank: int) -> float:
    """Of a forward and a backward pass: 4 a base weight that a token meets (frozen weights have no gradient),
    6 a LoRA weight, and attention."""
    config = engine.base.model.config
    share = config.num_experts_per_tok / config.num_experts
    base = sum(
        p.numel() * (share if "experts" in name else 1)
        for name, p in engine.base.model.named_parameters()
        if "embed_tokens" not in name
    )
    lora = sum(
        rank
        * (
            t.in_features * (config.num_experts_per_tok if t.kind == "expert_down" else 1)
            + t.out_features * (config.num_experts_per_tok if t.kind in ("expert_gate", "expert_up") else 1)
        )
        for t in engine.base.layout.targets
    )
    width = config.num_attention_heads * config.head_dim
    attention = 3 * 2 * 2 * width * (datum_tokens / 2) * config.num_hidden_layers
    return tokens * (4 * base + 6 * lora + attention)


def train_rows(report: Report, work: Work, rank: int, peak: float) -> None:
    for tokens, datum in ((1_024, 256), (4_096, 512), (16_384, 2_048)):
        batch = work.batch(tokens, datum)
        torch.cuda.reset_peak_memory_stats()
        times = timed(
            {"step": lambda b=batch: work.step([0], [b]), "base": lambda b=batch: work.base_only(b)},
            5,
        )
        seconds = times["step"].wall
        mfu = flops(work.engine, tokens, datum, rank) / seconds / peak
        label = f"1 x {tokens} tokens, rank {rank}"
        report.row(f"{label}: step ms", 1e3 * seconds, timings=times)
        report.row(f"{label}: share of the measured product's FLOP/s (MFU)", mfu)
        report.row(f"{label}: forward+backward+Adam over the base alone", seconds / times["base"].wall)
        report.row(f"{label}: peak memory, GiB", torch.cuda.max_memory_allocated() / 2**30)


def tenant_rows(report: Report, work: Work) -> None:
    for tokens in (64, 256):
        batches = [work.batch(tokens, 64) for _ in range(work.count)]
        for count in (1, 2, 4, 8, 16, 32):
            if count > work.count:
                break
            slots = list(range(count))
            arms = {
                "batched": lambda s=slots, b=batches: work.step(s, b),
                "one by one": lambda s=slots, b=batches: [work.step([slot], b) for slot in s],
            }
            times = timed(arms, 3)
            ratio = times["one by one"].wall / times["batched"].wall
            report.row(f"{count} x {tokens} tokens, batched over one by one", ratio, timings=times)


def sample_rows(report: Report, work: Work, directory: Path, new_tokens: int) -> None:
    other = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).cuda()
    other.generation_config.eos_token_id = None
    other.generation_config.pad_token_id = 0

    def generate(batch: int) -> None:
        tokens = torch.randint(0, work.engine.info.vocab_size, (batch, PROMPT_TOKENS), device="cuda")
        arguments = {
            "max_new_tokens": new_tokens,
            "min_new_tokens": new_tokens,
            "do_sample": True,
            "top_k": 0,
        }
        with torch.no_grad():
            other.generate(tokens, attention_mask=torch.ones_like(tokens), **arguments)

    for batch in (1, 8, 32):
        arms = {
            "base": lambda n=batch: work.sample(n, new_tokens, (None,)),
            "adapter": lambda n=batch: work.sample(n, new_tokens, ("adapter0",)),
            "two adapters": lambda n=batch: work.sample(n, new_tokens, ("adapter0", "adapter1")),
            "generate": lambda n=batch: generate(n),
        }
        times = timed(arms, 2, warmup=1)
        for name in ("base", "adapter", "two adapters"):
            rate = batch * new_tokens / times[name].wall
            ratio = times["generate"].wall / times[name].wall
            report.row(f"decode batch {batch}, {name}: over generate", ratio, ">= 0.95", timings=times)
            print(f"    {rate:,.0f} tokens/s")


def profile(work: Work, out: Path) -> None:
    """Where a training step and a few decode steps spend their time, as tables beside the results."""
    batch, large = work.batch(4_096, 512), work.batch(16_384, 2_048)
    jobs = {
        "step": lambda: work.step([0], [batch]),
        "large": lambda: work.step([0], [large]),
        "small": lambda: work.step([0], [work.batch(64, 64)]),
        "decode": lambda: work.sample(8, 8, ("adapter0",)),
    }
    for name, job in jobs.items():
        job()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as found:
            job()
            torch.cuda.synchronize()
        averages = found.key_averages()
        text = averages.table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=80)
        text += averages.table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60)
        (out / f"profile-{name}.txt").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("/tmp/bench-gpu"), help="for the models")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--tenants", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--microbatch-tokens", type=int, default=16_384)
    parser.add_argument("--profile", type=Path, help="folder for profiler tables")
    parser.add_argument("--parts", nargs="*", default=["train", "tenants", "sample"])
    arguments = parser.parse_args()
    assert torch.cuda.is_available(), "this benchmark needs a GPU"
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    report = Report("gpu")
    print(torch.cuda.get_device_name(), torch.__version__)
    peak = ceilings(report)
    start = time.perf_counter()
    directory = build(arguments.directory, arguments.layers)
    built = time.perf_counter()
    work = Work(directory, arguments.tenants, arguments.rank, arguments.microbatch_tokens)
    print(f"built in {built - start:.0f} s, loaded in {time.perf_counter() - built:.0f} s")
    what = f"{arguments.layers} layers with {arguments.tenants} slots of rank {arguments.rank}: memory, GiB"
    report.row(what, torch.cuda.memory_allocated() / 2**30)
    if arguments.profile:
        profile(work, arguments.profile)
    if "train" in arguments.parts:
        train_rows(report, work, arguments.rank, peak)
    if "tenants" in arguments.parts:
        tenant_rows(report, work)
    if "sample" in arguments.parts:
        sample_rows(report, work, directory, arguments.new_tokens)
    report.write()


if __name__ == "__main__":
    main()
