"""The shapes of a model's weights and of the LoRA on them, from its config.json.

Knows the architectures that are served and what their configs call things. Does not know bytes or ranks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SHIPPED = Path(__file__).parent / "architectures"
_DENSE = ("llama", "mistral", "qwen2", "qwen3")
_MIXTURES = ("qwen3_moe", "mixtral")
SERVED = (*_DENSE, *_MIXTURES)


class UnknownArchitecture(ValueError):
    """The model's config.json is not there, or not of a kind that can be planned; the message says which."""


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """inner: of a dense layer's MLP. num_experts: 0 without; expert_inner: of one of them. num_dense_layers:
    layers of a mixture that have a dense MLP instead. norm_size: floats of a layer's norms. bias_size: of its
    attention's biases. context: tokens."""

    model_type: str
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inner: int
    vocab_size: int
    is_tied: bool
    context: int
    norm_size: int
    bias_size: int
    num_experts: int = 0
    experts_per_token: int = 0
    expert_inner: int = 0
    num_dense_layers: int = 0

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def num_sparse_layers(self) -> int:
        return self.num_layers - self.num_dense_layers if self.num_experts else 0

    @property
    def attention_size(self) -> int:
        """Floats of one layer's four projections, biases included."""
        return 2 * self.hidden * (self.query_width + self.kv_width) + self.bias_size

    @property
    def experts_size(self) -> int:
        """Floats of one layer's experts, all of them."""
        return 3 * self.num_experts * self.hidden * self.expert_inner

    @property
    def num_parameters(self) -> int:
        embeddings = (1 if self.is_tied else 2) * self.vocab_size * self.hidden
        everywhere = self.num_layers * (self.attention_size + self.norm_size) + self.hidden
        dense = (self.num_layers - self.num_sparse_layers) * 3 * self.hidden * self.inner
        sparse = self.num_sparse_layers * (self.experts_size + self.num_experts * self.hidden)
        return embeddings + everywhere + dense + sparse

    @property
    def lora_columns(self) -> int:
        """Trained floats of an adapter for each of its ranks."""
        return sum(width * times for width, times in self.factors(self.num_experts))

    def factors(self, num_experts: int) -> list[tuple[int, int]]:
        """The widths of an adapter's factors where ``num_experts`` of each layer are held, and how often each
        comes. The factor on the hidden side of experts is one for all of them."""
        layers, sparse = self.num_layers, self.num_sparse_layers
        dense = layers - sparse
        attention = [(self.hidden, 4 * layers), (self.query_width, 2 * layers), (self.kv_width, 2 * layers)]
        mlp = [(self.hidden, 3 * dense), (self.inner, 3 * dense)]
        experts = [(self.hidden, 3 * sparse), (self.expert_inner * num_experts, 3 * sparse)]
        return [*attention, *mlp, *experts, (self.hidden, 1), (self.vocab_size, 1)]

    def matrices(self, num_experts: int) -> list[tuple[int, int, int]]:
        """Rows, columns and number of the weight matrices that tokens are multiplied with, where
        ``num_experts`` of each layer are held. Gate and up of fused experts are one matrix."""
        layers, sparse = self.num_layers, self.num_sparse_layers
        attention = [
            (self.query_width, self.hidden, 2 * layers),
            (self.kv_width, self.hidden, 2 * layers),
        ]
        experts = [
            (2 * self.expert_inner, self.hidden, sparse * num_experts),
            (self.hidden, self.expert_inner, sparse * num_experts),
        ]
        mlp = [(self.inner, self.hidden, 3 * (layers - sparse))]
        return [*attention, *mlp, *experts, (self.vocab_size, self.hidden, 1)]


def find_shapes(reference: str) -> ModelShapes:
    """Of a model directory, or of an ``ms://owner/name`` whose config.json is shipped with this package.

    Raises UnknownArchitecture.
    """
    if reference.startswith("ms://"):
        path = _SHIPPED / f"{reference.rpartition('/')[2]}.json"
        if not path.is_file():
            known = ", ".join(sorted(shipped.stem for shipped in _SHIPPED.glob("*.json")))
            raise UnknownArchitecture(
                f"no config.json of {reference} is at hand (there are: {known}); set path to a directory"
            )
    else:
        path = Path(reference) / "config.json"
    try:
        return read_shapes(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError) as error:
        raise UnknownArchitecture(f"{path}: {error}") from None
    except UnknownArchitecture as error:
        raise UnknownArchitecture(f"{path}: {error}") from None


def read_shapes(config: Any) -> ModelShapes:
    """Raises UnknownArchitecture."""
    if not isinstance(config, dict):
        raise UnknownArchitecture("it is not a JSON object")
    model_type = config.get("model_type")
    if model_type not in SERVED:
        raise UnknownArchitecture(f"model_type {model_type!r} is not one of {', '.join(SERVED)}")
    try:
        return _read(model_type, config)
    except KeyError as error:
        raise UnknownArchitecture(f"{error.args[0]} is missing") from None
    except (TypeError, ZeroDivisionError) as error:
        raise UnknownArchitecture(f"a size in it is wrong: {error}") from None


def _read(model_type: str, config: dict[str, Any]) -> ModelShapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    has_qk_norm = model_type in ("qwen3", "qwen3_moe")
    kv_bias = (heads + 2 * kv_heads) * head_dim
    # Qwen2 has biases on q, k and v whatever its config says; the others on all four if it says so.
    biases = kv_bias if model_type == "qwen2" else (kv_bias + hidden) * bool(config.get("attention_bias"))
    mixture: dict[str, int] = {}
    if model_type == "mixtral":
        mixture = {"num_experts": config["num_local_experts"], "expert_inner": config["intermediate_size"]}
    elif model_type == "qwen3_moe":
        # Newer versions of transformers write the second name.
        count = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
        mixture = {"num_experts": count, "expert_inner": config["moe_intermediate_size"]}
        mixture["num_dense_layers"] = _num_dense_layers(config)
    if mixture:
        mixture["experts_per_token"] = config["num_experts_per_tok"]
    return ModelShapes(
        model_type=model_type,
        hidden=hidden,
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        inner=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        is_tied=bool(config.get("tie_word_embeddings", False)),
        context=config["max_position_embeddings"],
        norm_size=2 * hidden + 2 * head_dim * has_qk_norm,
        bias_size=biases,
        **mixture,
    )


def _num_dense_layers(config: dict[str, Any]) -> int:
    step, dense = config.get("decoder_sparse_step") or 1, set(config.get("mlp_only_layers") or ())
    num_layers = config["num_hidden_layers"]
    return sum(layer in dense or (layer + 1) % step != 0 for layer in range(num_layers))
