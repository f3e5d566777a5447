"""The JSON requests besides forward and asample, as lenient models with the server's defaults.

Old clients omit fields or send null, new ones send fields we never heard of: all are welcome. Knows shapes
and ranges of single requests. Does not know tenants or what exists.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from twinkle_serve.protocol.data import AdamParams, LoraSpec
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.showing import shown

MAX_RANK = 32
MIN_TTL_S, MAX_TTL_S = 3600, 10 * 365 * 24 * 3600
MAX_PROJECT_LENGTH = 128
MAX_NAME_LENGTH = 1024
MAX_SOUGHT = 100
"""Names in each list of a search, which are compared with those of every session."""
MAX_KEPT_BYTES = 64 * 1024
"""Of one field, as JSON, that is kept with a session, a run or a checkpoint for as long as there is one."""
MAX_SMALL_BODY_BYTES = 2**20
"""Of requests that bring no tokens: several such fields at their limit fit, however they are spaced and
escaped."""
MAX_SEQ_ID = 2**31 - 1
"""Of a run's commands. What protobuf requests can hold; the journal adds to it, in 64 bits."""


def _small(value: Any) -> Any:
    """``value``. Raises ValueError, which names the field, where it is too large to be kept."""
    try:
        num_bytes = len(json.dumps(value, ensure_ascii=False).encode())
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if num_bytes > MAX_KEPT_BYTES:
        raise ValueError(f"has {num_bytes} bytes as JSON; at most {MAX_KEPT_BYTES} are possible")
    return value


def _are_texts(value: dict[str, Any]) -> dict[str, Any]:
    """``value``. Raises ValueError for the first that is no text."""
    wrong = next((key for key, item in value.items() if not isinstance(item, str)), None)
    if wrong is not None:
        raise ValueError(f"the value of {wrong[:64]!r} must be a string")
    return value


Metadata = dict[str, Any]
# The first item that is wrong ends the list: an error for each would take a hundred times the body's memory.
Texts = Annotated[list[str], Field(fail_fast=True)]
# For objects pydantic has no such choice.
_OF_TEXTS = Field(json_schema_extra={"additionalProperties": {"type": "string"}})
TextByName = Annotated[Metadata, AfterValidator(_are_texts), _OF_TEXTS]
KeptMetadata = Annotated[Metadata, AfterValidator(_small)]
Ttl = Annotated[int, Field(ge=MIN_TTL_S, le=MAX_TTL_S)]
# Clients count with these; they become parts of ids, and of names of files.
Counter = Annotated[int, Field(ge=0, lt=2**63)]
Model = TypeVar("Model", bound="Lenient")


def fold_seed(seed: Any) -> Any:
    """Any whole number as one of 0..2^63-1, small ones unchanged; other values as they are. JSON beyond 64
    bits comes as a float."""
    if isinstance(seed, float) and seed.is_integer():
        seed = int(seed)
    return seed % 2**63 if type(seed) is int else seed


Seed = Annotated[int, BeforeValidator(fold_seed)]


class Lenient(BaseModel):
    """Unknown fields are ignored, and a null counts as a field that was not sent."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None}
        return value


class Exact(Lenient):
    """What decides how a model is trained or sampled. A name that nobody knows is refused: its sender would
    get the default instead and not hear of it. No SDK so far sends such a name."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for key, item in value.items():
                if item is not None and key != "type" and key not in cls.model_fields:
                    raise ValueError(f"there is no {shown(key)}; there are {', '.join(cls.model_fields)}")
        return value


class CreateCustomLoss(Lenient):
    """What name, inputs and graph may be is loss_graph.py's business."""

    session_id: str
    custom_loss_seq_id: Counter
    name: Any = "loss"
    inputs: Any = None
    graph: Any = None


class CreateSession(Lenient):
    tags: Annotated[Texts, AfterValidator(_small)] = []
    user_metadata: KeptMetadata = {}
    sdk_version: str = Field("", max_length=MAX_NAME_LENGTH)
    project_id: str | None = Field(None, max_length=MAX_PROJECT_LENGTH)
    display_name: str | None = Field(None, max_length=MAX_NAME_LENGTH)


class Heartbeat(Lenient):
    session_id: str


class FinishSession(Lenient):
    reason: KeptMetadata = {"type": "success"}
    detail: Annotated[str | None, AfterValidator(_small)] = None


class LoraConfig(Exact):
    rank: int
    seed: Seed = 0
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    def as_spec(self, max_rank: int) -> LoraSpec:
        """Raises UserError for a rank that is not served or when nothing would be trained."""
        if not 1 <= self.rank <= max_rank:
            raise UserError(f"lora_config.rank is {self.rank}; 1 to {max_rank} are possible")
        if not (self.train_attn or self.train_mlp or self.train_unembed):
            raise UserError("lora_config trains nothing: set train_attn, train_mlp or train_unembed")
        return LoraSpec(self.rank, self.seed, self.train_attn, self.train_mlp, self.train_unembed)


class CreateModel(Lenient):
    session_id: str
    model_seq_id: Counter
    base_model: str
    user_metadata: KeptMetadata = {}
    lora_config: LoraConfig
    optimizer_config: Metadata = {}


class GetInfo(Lenient):
    model_id: str


class Adam(Exact):
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def as_params(self) -> AdamParams:
        """Raises UserError naming the number that is out of range."""
        for name, value, low, high in (
            ("learning_rate", self.learning_rate, 0.0, math.inf),
            ("beta1", self.beta1, 0.0, 1.0),
            ("beta2", self.beta2, 0.0, 1.0),
            ("eps", self.eps, 0.0, math.inf),
            ("weight_decay", self.weight_decay, 0.0, math.inf),
        ):
            if not low <= value < high:
                rule = "finite and at least 0" if high == math.inf else "at least 0 and below 1"
                raise UserError(f"adam_params.{name} is {value}; it must be {rule}")
        if self.eps == 0:
            raise UserError("adam_params.eps is 0; it must be above 0")
        if not math.isfinite(self.grad_clip_norm):
            raise UserError(f"adam_params.grad_clip_norm is {self.grad_clip_norm}; it must be finite")
        clip = max(0.0, self.grad_clip_norm)
        return AdamParams(self.learning_rate, self.beta1, self.beta2, self.eps, self.weight_decay, clip)


class OptimStep(Lenient):
    params: Metadata = Field(
        default={}, validation_alias=AliasChoices("adam_params", "optimizer_params", "optim_params")
    )

    def as_params(self) -> AdamParams:
        kind = self.params.get("type", "adamw")
        if kind not in ("adam", "adamw"):
            raise UserError(f"optimizer_params.type {shown(kind)} is not served; adamw is")
        return read(Adam, self.params, "adam_params").as_params()


class SaveWeights(Lenient):
    path: str | None = None
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: KeptMetadata = {}


class SaveForSampler(SaveWeights):
    sampling_session_seq_id: Counter | None = None
    kind: str = "snapshot"


class SaveExternal(SaveWeights):
    age_encryption_recipients: Texts = []


class LoadWeights(Lenient):
    """Into a living run, which ``Addressed`` names."""

    path: str
    optimizer: bool = False
    optimizer_config: Metadata = {}


class CreateFromWeights(LoadWeights):
    """Into a new run."""

    session_id: str
    model_seq_id: Counter
    base_model: str | None = None
    user_metadata: KeptMetadata = {}


class CreateSamplingSession(Lenient):
    session_id: str
    sampling_session_seq_id: Counter
    base_model: str | None = None
    model_path: str | None = None


class WeightsInfo(Lenient):
    tinker_path: str


class CopyWeights(Lenient):
    """Into a new run of a session, or of a project."""

    source_path: str
    session_id: str | None = None
    model_seq_id: Counter | None = None
    destination_project_id: str | None = Field(None, min_length=1, max_length=MAX_PROJECT_LENGTH)
    ttl_seconds: Ttl | None = None


class AssignProject(Lenient):
    project_id: str = Field(min_length=1, max_length=MAX_PROJECT_LENGTH)


class SearchOwner(Lenient):
    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: Texts = Field([], max_length=10)


class SearchStatus(Lenient):
    type: str
    reasons: Annotated[Texts, Field(max_length=MAX_SOUGHT)] | None = None


class SearchCursor(Lenient):
    last_created_at: AwareDatetime
    last_session_id: str


class SearchSessions(Lenient):
    session_id: str | None = None
    project_ids: Annotated[Texts, Field(max_length=MAX_SOUGHT)] | None = None
    user_metadata: Annotated[TextByName, AfterValidator(_small)] = {}
    display_name: str | None = Field(None, max_length=MAX_NAME_LENGTH)
    owner: SearchOwner = SearchOwner()
    statuses: Annotated[list[SearchStatus], Field(fail_fast=True, max_length=MAX_SOUGHT)] | None = None
    limit: int = Field(50, ge=1, le=200)
    cursor: SearchCursor | None = None


class SetTtl(Lenient):
    ttl_seconds: Ttl | None = None


class RequestId(Lenient):
    request_id: str


class SamplesOf(Lenient):
    """One copy of a sampling client: those that were unpickled number themselves."""

    sampling_session_id: str
    cloned_sampler_id: int = Field(0, ge=0, le=10**9)


class RetrieveFutures(Lenient):
    """timeout: None waits as long as the server likes; 0 only says what was retrieved."""

    target: SamplesOf
    prev_cursor: Counter = 0
    timeout: float | None = Field(None, ge=0)


class Addressed(Lenient):
    """What every command of a run begins with; read by protocol.forward.address."""

    model_id: str
    seq_id: int | None = Field(None, ge=0, le=MAX_SEQ_ID)


class ForwardBackward(Addressed):
    """JSON of old clients; the SDK sends protobuf since 0.19 at the latest."""

    forward_backward_input: Metadata


class Forward(Addressed):
    forward_input: Metadata


def read(model: type[Model], body: Mapping[str, Any], prefix: str = "") -> Model:
    """``body`` as ``model``. Raises UserError naming each field that is wrong."""
    try:
        return model.model_validate(dict(body))
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False, include_context=False, include_input=False)[:5]:
            place = ".".join(str(part) for part in (prefix, *item["loc"]) if part != "")
            problems.append(f"{place or 'body'}: {item['msg']}")
        raise UserError("; ".join(problems)) from None


def check_optimizer(config: Mapping[str, Any]) -> None:
    """Raises UserError unless ``config`` selects AdamW."""
    kind = config.get("type", "adamw")
    if kind != "adamw":
        raise UserError(f"optimizer_config.type {shown(kind)} is not served; adamw is")


def as_strings(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata with string values, as listings must show it; other values in their JSON form. Raises
    UserError."""
    try:
        return {
            str(key): value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in metadata.items()
        }
    except RecursionError:
        raise UserError("user_metadata is nested too deeply") from None
