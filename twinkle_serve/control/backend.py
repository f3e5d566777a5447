"""What the gateway may ask of the control plane: one method per thing a client can want.

The Ray coordinator actor and the in-process ControlPlane both offer exactly this. Every method takes the
caller's tenant first and treats another tenant's objects as absent. Knows no transport and no wire format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from twinkle_serve.protocol.data import AdamParams, LoraSpec, SampleRequest
from twinkle_serve.protocol.work import Failure, ModelInfo

# A request id says what it was for even when the promise is forgotten: a lost sample is answered 410, so
# that the SDK submits it again; lost training work is not.
SAMPLING_ID_PREFIX = "sample-"
TRAINING_ID_PREFIX = "train-"


@dataclass(frozen=True, slots=True)
class Poll:
    """The answer to a poll. Exactly one of the three is meant:

    done: ``value`` (any protocol.data result, dict, or None) or ``failure``;
    pending: ``queue_state`` ("active", "paused_capacity", "paused_rate_limit") and a reason for the user;
    gone: the id is unknown or its retention ran out; its prefix tells which answer the SDK needs.
    """

    state: str  # "done" | "pending" | "gone"
    value: Any = None
    failure: Failure | None = None
    queue_state: str = "active"
    queue_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """A sample that is not pending any more. fine: it has a result; otherwise it failed or is gone."""

    request_id: str
    fine: bool


@dataclass(frozen=True, slots=True)
class PassCommand:
    """forward / forward_backward: ``datums`` is DatumBatch.pack(), ``lengths`` its tokens per datum.

    loss_tokens: what it costs at least, in tokens, since its loss takes time however short the datums are.
    """

    datums: bytes
    lengths: tuple[int, ...]
    loss_fn: str
    loss_config: Mapping[str, float | str]
    backward: bool
    loss_tokens: int = 0


@dataclass(frozen=True, slots=True)
class OptimCommand:
    params: AdamParams


@dataclass(frozen=True, slots=True)
class SaveCommand:
    """save_weights ("weights"), a named sampler save ("sampler_weights") or an export
    ("external_weights"). ``name`` None lets the server choose one. age_recipients: public keys to which
    the files are encrypted; none: they are not."""

    kind: str
    name: str | None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    age_recipients: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SnapshotCommand:
    """save_weights_for_sampler without a name: freeze for sampling as a new sampling session. inflight: and
    let all earlier sessions of the run that were made so draw from these weights from now on."""

    sampling_session_seq_id: int
    inflight: bool = False


@dataclass(frozen=True, slots=True)
class LoadCommand:
    path: str
    optimizer: bool


@dataclass(frozen=True, slots=True)
class UnloadCommand:
    """Forget the run's live state; its checkpoints stay."""


@dataclass(frozen=True, slots=True)
class RejectedCommand:
    """A request that could not be accepted but whose seq_id is spent: its promise fails in its turn."""

    failure: Failure


Command = (
    PassCommand | OptimCommand | SaveCommand | SnapshotCommand | LoadCommand | UnloadCommand | RejectedCommand
)


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A training run as its owner sees it. ``training_run_id`` equals the model id."""

    run_id: str
    tenant: str
    model: ModelInfo
    spec: LoraSpec


@dataclass(frozen=True, slots=True)
class SessionQuery:
    """None: whatever it is. owners: tenants. statuses: pairs of a status and its finish reasons (None: all).
    after: place of the last session of the page before."""

    session_id: str | None = None
    project_ids: tuple[str, ...] | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    display_name: str | None = None
    owners: tuple[str, ...] | None = None
    statuses: tuple[tuple[str, tuple[str, ...] | None], ...] | None = None
    limit: int = 50
    after: tuple[float, str] | None = None


class NotFound(Exception):
    """No such object for this tenant. HTTP 404."""


class Invalid(Exception):
    """The request cannot be right, now or later; the message names field and limit. HTTP 400."""


class Backend(Protocol):
    """See the module's words. All methods are coroutines; NotFound and Invalid are the only errors meant
    for the client."""

    async def healthy(self) -> bool: ...
    async def models(self) -> Sequence[ModelInfo]: ...

    # sessions -------------------------------------------------------------------------------------
    async def create_session(self, tenant: str, info: Mapping[str, Any]) -> str: ...
    async def heartbeat(self, tenant: str, session_id: str) -> bool:
        """False once the session is finished (HTTP 410)."""
        ...

    async def finish_session(self, tenant: str, session_id: str, reason: Mapping[str, Any]) -> None: ...
    async def list_sessions(self, tenant: str, limit: int, offset: int) -> list[str]: ...
    async def get_session(self, tenant: str, session_id: str) -> Mapping[str, Any]:
        """training_run_ids, sampler_ids, user_metadata, display_name."""
        ...

    # training -------------------------------------------------------------------------------------
    async def create_model(
        self,
        tenant: str,
        session_id: str,
        model_seq_id: int,
        base_model: str,
        spec: LoraSpec,
        user_metadata: Mapping[str, Any],
    ) -> str:
        """Returns the request id; resolves to {"model_id": ...}. Deduped on (session_id, model_seq_id)."""
        ...

    async def create_model_from(
        self,
        tenant: str,
        session_id: str,
        model_seq_id: int,
        path: str,
        optimizer: bool,
        base_model: str | None,
        user_metadata: Mapping[str, Any],
    ) -> str:
        """load_weights form A: a new run from a checkpoint. Resolves to {"model_id", "path"}."""
        ...

    async def submit(self, tenant: str, run_id: str, seq_id: int | None, command: Command) -> str:
        """Append to the run's command log; returns the request id at once. Deduped on (run_id, seq_id).
        Resolves to: ForwardResult; dict of metrics; {"path": ...} or {"sampling_session_id": ...};
        {"path", "model_id"} for a load; {"model_id"} for an unload."""
        ...

    async def run_info(self, tenant: str, run_id: str) -> RunInfo: ...
    async def create_custom_loss(
        self, tenant: str, session_id: str, custom_loss_seq_id: int, graph: str | Failure
    ) -> str:
        """Keep an uploaded loss (text of protocol.loss_graph) that a rank has tried. Returns the request id
        once the loss is durable; resolves to {"loss_id"}. Deduped on (session_id, custom_loss_seq_id)."""
        ...

    async def custom_loss(self, tenant: str, loss_id: str) -> str:
        """Its text. Raises NotFound."""
        ...

    async def run_insight(self, tenant: str, run_id: str, curves: bool = True) -> Mapping[str, Any]:
        """A run's numbers, its curves by step if asked for, and what it is doing: control/insight.py."""
        ...

    async def report_metrics(
        self, tenant: str, run_id: str, step: float | None, values: Mapping[str, float]
    ) -> None:
        """Numbers that a run's own program wants among its curves: its reward, for instance. step: None is
        the run's last optimizer step."""
        ...

    async def session_trace(self, tenant: str, session_id: str) -> Mapping[str, Any]:
        """What the session's last requests and their ticks took, as a Chrome trace."""
        ...

    async def cluster_view(self) -> Mapping[str, Any]:
        """The whole service; only for its operators."""
        ...

    # sampling -------------------------------------------------------------------------------------
    async def create_sampler(
        self,
        tenant: str,
        session_id: str,
        sampling_session_seq_id: int,
        base_model: str | None,
        model_path: str | None,
    ) -> str: ...
    async def sampler_info(self, tenant: str, sampler_id: str) -> Mapping[str, Any]:
        """sampler_id, base_model, model_path, model: ModelInfo."""
        ...

    async def sample(
        self, tenant: str, sampler_id: str, seq_id: int | None, request: SampleRequest | Failure
    ) -> tuple[str, list[str]]:
        """Returns (request id, one sequence id per sample). Deduped on (sampler_id, seq_id)."""
        ...

    async def sample_model(
        self,
        tenant: str,
        base_model: str | None,
        model_path: str | None,
        request: SampleRequest,
        stream: bool,
    ) -> str:
        """One sample of a base model or a checkpoint, without a sampling session. Returns the request id.
        ``stream``: it can be followed while it grows."""
        ...

    async def cancel(self, tenant: str, request_id: str) -> None: ...

    # promises -------------------------------------------------------------------------------------
    async def poll(self, tenant: str, request_id: str, timeout_s: float) -> Poll:
        """Waits up to ``timeout_s`` for the result. A result can be polled again until retention ends."""
        ...

    async def follow(self, tenant: str, request_id: str, after: int, timeout_s: float) -> Poll:
        """Like ``poll``, but a streamed sample also answers as soon as there is news: a pending Poll then
        holds a tuple of SampleDelta in ``value``, all but the first ``after`` that ever came. A finished one
        has the whole result."""
        ...

    async def poll_samples(
        self, tenant: str, sampler_id: str, clone: int, cursor: int, timeout_s: float
    ) -> tuple[tuple[Ended, ...], int] | None:
        """The samples of one copy of a sampling client that ended after ``cursor``, waiting up to
        ``timeout_s`` for one, and the cursor to go on with. None: the client waits for samples of an earlier
        life of this server, and nobody will end its wait. Raises NotFound."""
        ...

    # management -----------------------------------------------------------------------------------
    async def list_runs(
        self, tenant: str, limit: int, offset: int, project_id: str | None = None
    ) -> tuple[list[Mapping[str, Any]], int]:
        """One page of wire TrainingRun dicts, and the total."""
        ...

    async def copy_checkpoint(
        self,
        tenant: str,
        path: str,
        place: tuple[str, int] | None,
        project_id: str | None,
        ttl_seconds: int | None,
        once: str,
    ) -> str:
        """The path of a copy of the tenant's own or a published checkpoint, in a run that is not trained.
        place: (session id, model_seq_id) of that run; None: a new session in the project. once: the same
        text means the same copy. Raises Busy when the tenant's checkpoints leave no room."""
        ...

    async def assign_project(self, tenant: str, session_id: str, project_id: str) -> None: ...
    async def search_sessions(
        self, tenant: str, query: SessionQuery
    ) -> tuple[list[Mapping[str, Any]], Mapping[str, Any] | None]:
        """A page of wire SessionSummary dicts, newest first, and the wire cursor of the next page."""
        ...

    async def bill(self, tenant: str, since: float, until: float) -> Mapping[str, Any]:
        """The wire's BillingUsageResponse for the hours that begin in [since, until)."""
        ...

    async def checkpoint_storage(self, tenant: str, project_id: str | None) -> Mapping[str, Any]: ...
    async def audit(self, tenant: str, day: str | None, event_type: str) -> list[dict[str, Any]]: ...

    async def get_run(self, tenant: str, run_id: str) -> Mapping[str, Any]: ...
    async def list_checkpoints(
        self, tenant: str, run_id: str | None, limit: int | None, offset: int
    ) -> tuple[list[Mapping[str, Any]], int]:
        """Wire Checkpoint dicts of one run, or of all the tenant's runs, newest first; and the total."""
        ...

    async def weights_info(self, tenant: str, path: str) -> Mapping[str, Any]: ...
    async def delete_checkpoint(self, tenant: str, path: str) -> None: ...
    async def publish_checkpoint(self, tenant: str, path: str, public: bool) -> None: ...
    async def set_checkpoint_ttl(self, tenant: str, path: str, ttl_seconds: int | None) -> None: ...
    async def checkpoint_files(self, tenant: str, path: str, owned: bool = False) -> Mapping[str, str]:
        """Each file's name within the checkpoint to its absolute path, on storage that the gateway can
        read. The tenant's own checkpoints and, unless ``owned``, published ones. Raises NotFound."""
        ...
