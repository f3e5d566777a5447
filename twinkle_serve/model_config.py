"""The part of the configuration about a base model: loading, ranks, steps, sampling.

Every field says its unit, range and default. Knows no component's inside; the rest is in config.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from twinkle_serve.strict import Strict


class SamplerConfig(Strict):
    """How a group samples, and its policy where training and samples both wait: each tick trains first and
    then decodes, for as long as makes ``share`` of the group's time in the long run and ``decode_budget_ms``
    at least. Where only one of the two waits it has all of the time. With ``sampling_groups`` samples leave
    the groups that train as far as their weights are on disk."""

    max_batch: int = Field(64, ge=1, le=4096, description="sequences decoded together")
    adapter_slots: int = Field(
        8,
        ge=1,
        description="adapters of rank max_rank that can be decoded with at once, more of smaller ranks; "
        "samples with others wait until some are idle",
    )
    kv_cache_tokens: int = Field(
        65_536,
        ge=256,
        description="tokens of KV cache, all sequences together. Each rank of a group has an equal part: a "
        "prompt that is longer than it is refused, and a sample that reaches its length ends there",
    )
    prefill_chunk_tokens: int = Field(
        2_048, ge=16, description="prompt tokens prefilled between decode steps"
    )
    share: float = Field(
        0.5, ge=0, le=0.95, description="of a group's time, decoding while training work waits, 0 to 0.95"
    )
    decode_budget_ms: float = Field(
        50.0, gt=0, description="least decoding time of a tick while training work waits, milliseconds"
    )


class PlannerConfig(Strict):
    company_wait_ms: float = Field(
        25.0,
        ge=0,
        le=1000,
        description="longest a ready pass waits for a recently active run, milliseconds; never above half "
        "of the last pass, and only for clients that usually come back in that time",
    )
    tick_tokens: int = Field(16_384, ge=1, description="training tokens taken into one tick, all tenants")
    gap_timeout_s: float = Field(
        300.0, gt=0, description="a hole in a run's seq_ids fails the waiting successors after this, seconds"
    )


class ModelConfig(Strict):
    name: str = Field(min_length=1, description="what clients pass as base_model")
    path: str = Field(min_length=1, description="local directory, or ms://owner/model on ModelScope")
    revision: str | None = Field(None, description="pinned hub revision")
    checksums: bool = Field(
        False,
        description="before loading, compare the weight files with SHA256SUMS in their directory, on every "
        "machine that has ranks",
    )
    ranks: int = Field(1, ge=1, le=1024, description="processes that share the base model")
    groups: int = Field(
        1, ge=1, le=1024, description="groups of ranks, each with the whole model; a run lives in one of them"
    )
    sampling_groups: int = Field(
        0,
        ge=0,
        description="so many of the groups only sample: from the base model, checkpoints, and snapshots once "
        "they are on disk; no run lives there",
    )
    sharding: Literal["single", "expert_parallel", "zero3"] = Field(
        "single",
        description="how ranks share it. expert_parallel: each holds a part of the experts, the fast way for "
        "mixtures of experts; zero3: each holds a part of every weight, any model, slow to sample from",
    )
    expert_dispatch: Literal["all_gather", "all_to_all"] = Field(
        "all_gather",
        description="how tokens reach their experts. all_gather: inside a node; all_to_all: moves less "
        "between nodes if there are more ranks than experts per token",
    )
    placement: Literal["pack", "spread"] = Field(
        "pack", description="ranks on as few nodes as possible, or on different ones where there are"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="where ranks compute. cuda: a GPU each, waited for; auto: cuda if the cluster has a GPU "
        "for each rank beside what `device: cuda` and the models before this one take, else cpu",
    )
    gpu_memory_bytes: int | None = Field(
        None,
        ge=2**20,
        description="memory of the device that each rank has, for `plan` to fit it into, bytes",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the base model; auto: float32 on CPU, bfloat16 on GPU"
    )
    num_threads: int | None = Field(None, ge=1, description="CPU threads of a rank; null: all cores / ranks")
    max_rank: int = Field(32, ge=1, le=32, description="largest LoRA rank served")
    max_resident_adapters: int = Field(8, ge=1, description="training slots; further runs are paged out")
    max_context_length: int | None = Field(
        None, ge=1, description="tokens per sequence; null: the model's own limit"
    )
    microbatch_tokens: int = Field(2_048, ge=1, description="token budget of one packed microbatch")
    logits_chunk_tokens: int = Field(
        256, ge=1, description="rows of logits alive at once; 2048 keeps a large GPU busier"
    )
    activation_checkpointing: bool = Field(
        False,
        description="compute each layer again in the backward pass instead of keeping what it computed: less "
        "memory, about a third more work",
    )
    kernels: Literal["auto", "loop", "grouped"] = Field(
        "auto", description="LoRA products: one per adapter, or grouped; auto: grouped on GPU if shapes fit"
    )
    pack_weights: Literal["auto", "on", "off"] = Field(
        "auto",
        description="keep the frozen float32 weights in the CPU kernels' own layout too: faster, three times "
        "their memory; auto: on the CPU up to 2 GiB of weights",
    )
    deterministic: bool = Field(
        False,
        description="bitwise the same numbers alone or among others: requests never share a "
        "microbatch, nor sequences a decode step, and the first rank of several does all sampling",
    )
    stall_deadline_s: float = Field(
        60.0,
        gt=0,
        description="a group is killed and rebuilt when a rank has not got on with a tick (by one layer) for "
        "so long, seconds; ten times that where it reads or writes adapters on disk",
    )
    tick_deadline_s: float = Field(
        3600.0, gt=0, description="and when a tick takes so long, however it gets on, seconds"
    )
    load_deadline_s: float = Field(
        3600.0, gt=0, description="longest time for finding room for the ranks and loading the model, seconds"
    )
    host_page_bytes: int = Field(
        4 * 2**30, ge=0, description="paged adapters each rank keeps in host memory, bytes"
    )
    disk_page_bytes: int = Field(
        64 * 2**30,
        ge=0,
        description="paged adapters each rank keeps on disk, bytes; at the limit new runs wait",
    )
    page_dir: Path | None = Field(
        None,
        description="directory of these, on each rank's own disk; null: the system's temporary directory",
    )
    sampler: SamplerConfig = SamplerConfig()
    planner: PlannerConfig = PlannerConfig()

    @model_validator(mode="after")
    def _some_group_trains(self) -> ModelConfig:
        if self.sampling_groups >= self.groups:
            raise ValueError(
                f"sampling_groups {self.sampling_groups} must be below groups {self.groups}: one must train"
            )
        return self

    @model_validator(mode="after")
    def _ranks_share(self) -> ModelConfig:
        if self.ranks > 1 and self.sharding == "single":
            raise ValueError(
                f"{self.ranks} ranks need a way to share the model: set sharding to expert_parallel or zero3"
            )
        return self
