"""The frozen base model: loaded from a directory, with LoRA layers and packed attention put in place.

Knows Hugging Face's model classes and where LoRA applies in them. Does not know slots' contents, losses,
or how a model directory came to this machine (hub/).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from twinkle_serve.config import ModelConfig
from twinkle_serve.engine import attention, experts
from twinkle_serve.engine.agreement import disagreement
from twinkle_serve.engine.attach import attach
from twinkle_serve.engine.attention import Attend, AttentionSwitch, PackedCausal
from twinkle_serve.engine.frozen import pack
from twinkle_serve.engine.grouped import fits
from twinkle_serve.engine.layers import LoraLinear, Segments
from twinkle_serve.engine.layout import AdapterLayout, Group, Target
from twinkle_serve.engine.logprobs import (
    HeadSegment,
    full_logits,
    target_logprobs,
    top_k_logprobs,
)
from twinkle_serve.engine.norms import replace_norms
from twinkle_serve.engine.packing import make_segments
from twinkle_serve.engine.sharding.expert_parallel import ExpertParallel
from twinkle_serve.engine.sharding.families import SERVED, family_of
from twinkle_serve.engine.sharding.files import WeightFiles
from twinkle_serve.engine.sharding.ranks import Ranks
from twinkle_serve.engine.sharding.shares import Shares
from twinkle_serve.engine.sharding.strategy import Sharding, Stretches
from twinkle_serve.engine.sharding.zero3 import Zero3
from twinkle_serve.engine.slots import Segment
from twinkle_serve.engine.unsupported import UnsupportedModel as UnsupportedModel
from twinkle_serve.engine.windows import compare_windows
from twinkle_serve.model_files import has_weights
from twinkle_serve.protocol.work import ModelInfo

logger = logging.getLogger(__name__)

_LARGEST_PACKED_BYTES = 2 * 2**30
# Small models may not show the difference that these make, so _verify alone would not do.
_UNSERVED_SWITCHES = ("attn_logit_softcapping", "final_logit_softcapping")


@dataclass(slots=True)
class BaseModel:
    """A loaded base model.

    head_target: index of the unembedding in ``layout.targets``. The head itself is not wrapped: its logits
    are only ever computed in chunks (logprobs.py).
    layout: of what this rank holds of an adapter; ``shares`` knows the whole.
    """

    model: PreTrainedModel
    info: ModelInfo
    layout: AdapterLayout
    shares: Shares
    sharding: Sharding
    segments: Segments
    attention: AttentionSwitch
    head_target: int
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype

    @property
    def head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head

    def target_logprobs(
        self, hidden: torch.Tensor, segments: Sequence[Segment], rows: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """float32 [M]: the logprob of ``targets[m]`` at row ``rows[m]`` of ``hidden`` [T, H].

        segments: those of group "unembed".
        """
        return target_logprobs(
            hidden,
            *self._head(segments),
            rows,
            targets,
            chunk_tokens=self.config.logits_chunk_tokens,
            isolated=self.config.deterministic,
        )

    def full_logits(self, hidden: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """float32 [T, V]: all logits of a few rows."""
        return full_logits(hidden, *self._head(segments))

    def top_k_logprobs(
        self, hidden: torch.Tensor, segments: Sequence[Segment], k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k likeliest tokens of each row, best first, and their logprobs: int64 and float32 [T, k]."""
        chunk_tokens = self.config.logits_chunk_tokens
        return top_k_logprobs(hidden, *self._head(segments), k, chunk_tokens=chunk_tokens)

    def _head(
        self, segments: Sequence[Segment]
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[HeadSegment]]:
        return self.head.weight, self.head.bias, HeadSegment.of(segments, self.head_target)

    @property
    def ranks(self) -> Ranks:
        return self.sharding.ranks

    def enter(self, by_rank: Sequence[Stretches]) -> Mapping[Group, list[Segment]]:
        """A pass begins: whose rows each rank has, at least one each. Returns this rank's segments.

        All ranks make the same passes: every forward is one collective act.
        """
        segments = make_segments(by_rank[self.ranks.rank])
        self.segments.set(segments)
        self.sharding.enter(by_rank)
        return segments

    def hidden_states(
        self, token_ids: torch.Tensor, position_ids: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Final hidden states [T, H] of packed int64 rows [T]. The LoRA segments must be set.

        The embeddings are made a leaf that requires grad: with a frozen base nothing else would, and the
        backward passes of the LoRA layers would never run.
        """
        self.attention.attend = attend
        embeddings = self.model.get_input_embeddings()(token_ids.unsqueeze(0))
        if torch.is_grad_enabled():
            embeddings = embeddings.detach().requires_grad_()
        out = self.model.base_model(
            inputs_embeds=embeddings, position_ids=position_ids.unsqueeze(0), use_cache=False
        )
        return out.last_hidden_state[0]


def load_base_model(config: ModelConfig, directory: Path, ranks: Ranks | None = None) -> BaseModel:
    """Load and prepare the model in ``directory``, or this rank's part of it.

    Raises UnsupportedModel for a directory without a usable config or with an architecture whose logits the
    packed path does not reproduce, and OSError for missing or damaged weight files.
    """
    ranks = ranks or Ranks()
    device = choose_device(config)
    dtype = _dtype(config, device)
    _set_threads(config)
    if device.type == "cuda":
        _set_precision(config, dtype)
    model_config = _read_config(directory)
    if ranks.size > 1 or has_weights(directory):
        files = WeightFiles(directory)  # says in a moment what loading would stumble over in minutes
        if config.checksums:
            ranks.wait_for_all(config.load_deadline_s)  # another machine's download may be slower
            files.verify(ranks)
    sharding = _sharding(config, ranks, device)
    model = sharding.load(config, model_config, directory, device, dtype)
    ranks.wait_for_all(config.load_deadline_s)
    probe = _probe_tokens(model)
    expected = sharding.reference_logits(model, probe)
    base = prepare(model, config, directory, device, dtype, sharding)
    if config.activation_checkpointing:
        _checkpoint_activations(model)
    _verify(base, probe, expected)
    if ranks.size > 1:
        _rehearse(base)
    return base


def _sharding(config: ModelConfig, ranks: Ranks, device: torch.device) -> Sharding:
    """A group of one shares nothing, whatever the configuration says."""
    if ranks.size == 1:
        return Sharding(ranks)
    if config.sharding == "expert_parallel":
        return ExpertParallel(ranks, device, config)
    assert config.sharding == "zero3"
    return Zero3(ranks, device)


def _set_precision(config: ModelConfig, dtype: torch.dtype) -> None:
    """How a GPU multiplies and adds in this process."""
    # In a bfloat16 model the unembedding's low-rank products alone are float32; the rest is coarser anyway.
    torch.set_float32_matmul_precision("high" if dtype == torch.bfloat16 else "highest")
    # Some kernels add in the order in which their blocks happen to finish.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic, warn_only=True)


def prepare(
    model: PreTrainedModel,
    config: ModelConfig,
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    sharding: Sharding | None = None,
) -> BaseModel:
    """Put LoRA layers and packed attention into a loaded model."""
    sharding = sharding or Sharding(Ranks())
    segments, switch = Segments(), AttentionSwitch()
    targets = attach(model, segments, switch, sharding)
    replace_norms(model)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UnsupportedModel(f"{type(model).__name__}: the unembedding is not a linear layer")
    targets.append(Target("linear", "lm_head", "unembed", head.in_features, head.out_features))
    model.set_attn_implementation(attention.IMPLEMENTATION)
    model.config._experts_implementation = experts.IMPLEMENTATION
    layout = AdapterLayout.build(targets, family_of(model.config.model_type))
    shares = Shares(layout, sharding.ranks, split_experts=sharding.splits_experts)
    segments.grouped = _grouped(config, shares.layout, device, dtype)
    sharding.attach(model, grouped=segments.grouped)
    if not sharding.partitions_weights and _packs(config, model, device, dtype):
        pack(_frozen_matrices(model))
    return BaseModel(
        model=model,
        info=_info(model, config, directory),
        layout=shares.layout,
        shares=shares,
        sharding=sharding,
        segments=segments,
        attention=switch,
        head_target=len(targets) - 1,
        config=config,
        device=device,
        dtype=dtype,
    )


def _grouped(config: ModelConfig, layout: AdapterLayout, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether to use grouped products. On the CPU a loop is as fast and does not pad."""
    if config.kernels == "auto":
        return device.type == "cuda" and fits(layout, dtype)
    if config.kernels == "grouped" and not fits(layout, dtype):
        raise UnsupportedModel("kernels: grouped needs layer widths that are multiples of 16 bytes")
    return config.kernels == "grouped"


def _packs(config: ModelConfig, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether to keep weights packed (frozen.py)."""
    possible = device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if config.pack_weights == "on" and not possible:
        raise UnsupportedModel("pack_weights: on needs a float32 base model on the CPU")
    small = sum(p.nbytes for p in model.parameters()) <= _LARGEST_PACKED_BYTES
    return possible and (config.pack_weights == "on" or (config.pack_weights == "auto" and small))


def _frozen_matrices(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """The weights that LoRA layers, experts and the unembedding multiply with."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            yield module.base.weight
        elif hasattr(module, "twinkle_targets"):
            yield module.gate_up_proj
            yield module.down_proj
    yield model.get_output_embeddings().weight


def _info(model: PreTrainedModel, config: ModelConfig, directory: Path) -> ModelInfo:
    limit = int(getattr(model.config, "max_position_embeddings", 0) or 0)
    if config.max_context_length is not None:
        limit = min(limit, config.max_context_length) if limit else config.max_context_length
    if not limit:
        raise UnsupportedModel(
            f"{directory} does not say how long its context is (max_position_embeddings); "
            f"set max_context_length for {config.name}"
        )
    eos = getattr(model.generation_config, "eos_token_id", None)
    if eos is None:
        eos = getattr(model.config, "eos_token_id", None)
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
    is_local = not config.path.startswith("ms://")
    return ModelInfo(
        name=config.name,
        arch=type(model).__name__,
        tokenizer_id=str(directory.resolve()) if is_local else config.path.removeprefix("ms://"),
        vocab_size=int(model.config.vocab_size),
        max_context_length=limit,
        max_rank=config.max_rank,
        max_slots=config.max_resident_adapters,
        eos_token_ids=eos_ids,
    )


def _read_config(directory: Path) -> object:
    if not (directory / "config.json").is_file():
        raise UnsupportedModel(f"{directory} holds no config.json; it is not a Hugging Face model directory")
    # Looked at before transformers does, which would ask whoever sits at the terminal whether to run it.
    raw = json.loads((directory / "config.json").read_bytes())
    if raw.get("auto_map"):
        raise UnsupportedModel(f"{directory} needs code of its own (auto_map); that is not run here")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (KeyError, ValueError) as error:
        first = str(error).partition("\n")[0]
        kind = raw.get("model_type")
        raise UnsupportedModel(
            f"{directory}: model_type {kind!r} cannot be read ({first}); {SERVED}"
        ) from None
    for switch in _UNSERVED_SWITCHES:
        if getattr(config, switch, None) is not None:
            raise UnsupportedModel(f"{directory}: {switch} is not served")
    if "longrope" in _rope_types(config):
        # transformers chooses one set of factors for a whole pass, by the longest of all sequences in it.
        raise UnsupportedModel(f"{directory}: rope_type 'longrope' is not served")
    return config


def _rope_types(config: object) -> set[str]:
    """One for the whole model, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return {
        each.get("rope_type", "") for each in (parameters, *parameters.values()) if isinstance(each, dict)
    }


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """transformers asks each layer whether it is being trained; inside it that would switch dropout on."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _probe_tokens(model: PreTrainedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, int(model.config.vocab_size), (7,), generator=generator).to(model.device)


def _verify(base: BaseModel, probe: torch.Tensor, expected: torch.Tensor) -> None:
    """The packed path must give the model's own logits, for the probe alone and beside another sequence."""
    length = len(probe)
    token_ids = torch.cat([probe.flip(0)[:3], probe])
    positions = torch.cat([torch.arange(3), torch.arange(length)]).to(base.device)
    base.enter([[(None, 3 + length)]] * base.ranks.size)
    # The probe is shorter than any window: its logits do not show one that is left out.
    with torch.no_grad(), compare_windows(base.model, base.info.max_context_length):
        hidden = base.hidden_states(token_ids, positions, PackedCausal([3, length]))
        logits = base.head(hidden[3:]).float()
    tolerance = 1e-3 if base.dtype == torch.float32 else 0.1
    error = _difference(logits, expected, base.dtype)
    if not error <= tolerance:
        raise UnsupportedModel(
            f"{base.info.arch}: packed logits differ from the model's own by {error:.2g} (limit {tolerance})"
        )
    logger.info("packed forward agrees with %s within %.1e", base.info.arch, error)


def _difference(logits: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    """Of [N, V], relative to the largest logit."""
    return disagreement(logits, expected, expected.abs().max().clamp(min=1), dtype)


def _rehearse(base: BaseModel) -> None:
    """One row through the model and back: every rank learns which collectives a pass makes."""
    base.enter([[(None, 1)]] * base.ranks.size)
    row = torch.zeros(1, dtype=torch.int64, device=base.device)
    hidden = base.hidden_states(row, row, PackedCausal([1]))
    base.sharding.enter_backward()
    hidden.backward(torch.zeros_like(hidden))
    base.sharding.leave()
    base.sharding.rehearsed()


def choose_device(config: ModelConfig) -> torch.device:
    """Where the model goes."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def _dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.float32 if config.dtype == "float32" else torch.bfloat16


def _set_threads(config: ModelConfig) -> None:
    """Ray sets OMP_NUM_THREADS=1 for actors without a CPU reservation, which would halve a local server."""
    torch.set_num_threads(config.num_threads or max(1, (os.cpu_count() or 1) // config.ranks))
