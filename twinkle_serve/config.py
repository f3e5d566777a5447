"""The whole configuration: one strict pydantic tree, loaded from YAML with dotted overrides.

Every field says its unit, range and default; an unknown key is an error. Knows no component's inside.
"""

from __future__ import annotations

import os
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from twinkle_serve.loss_config import LossesConfig
from twinkle_serve.model_config import ModelConfig
from twinkle_serve.serve_file import from_serve_file
from twinkle_serve.strict import Strict


class HttpConfig(Strict):
    host: str = Field("127.0.0.1", description="address the HTTP proxy binds to")
    port: int = Field(8000, ge=1, le=65535, description="TCP port")
    replicas: int = Field(2, ge=1, le=64, description="ingress replicas; they hold no state")
    proxy: Literal["serve", "haproxy"] = Field(
        "serve",
        description="who takes requests in when `up` starts Ray: Serve's own proxy, or HAProxy, with a third "
        "less CPU a request; a Ray that runs already is told by its environment (docs/operations.md)",
    )
    route_prefix: str = Field(
        "/",
        pattern=r"^/$|^(/[^/{}\s]+)+$",
        description="everything is served below this path; it does not end in a slash",
    )
    public_url: str | None = Field(
        None, description="base of download links; null: taken from the request's Host header"
    )
    poll_hold_s: float = Field(30.0, gt=0, le=40, description="longest time a poll is held, seconds")
    one_poll_for_samples: bool = Field(
        False,
        description="tell SDK clients to wait for all samples of a sampling client with one poll instead of "
        "one each. Fewer open connections; but samples in flight when the coordinator restarts then end in "
        "an error for the program, where polls one by one let the SDK submit them again",
    )
    max_body_bytes: int = Field(
        256 * 2**20, ge=2**20, description="largest request body, bytes, decompressed"
    )


class ModelScopeConfig(Strict):
    endpoint: str = Field("https://modelscope.cn", description="the site whose tokens count; there are two")
    marker_repo: str | None = Field(
        None, pattern=r"^[^/\s]+/[^/\s]+$", description="owner/name of a model that only members can see"
    )
    allow_users: list[str] = Field(default_factory=list, description="user names that may come in anyway")
    cache_s: float = Field(300.0, ge=0, le=3600, description="how long a good token is believed, seconds")
    grace_s: float = Field(
        3600.0,
        ge=0,
        description="how long one is still believed while ModelScope is away, seconds; requests then wait "
        "for it 2 s, once in 15 s a token",
    )
    push_published: bool = Field(
        True, description="publishing a checkpoint also pushes its adapter to a repository of its owner"
    )
    push_visibility: Literal["private", "public"] = Field("private", description="of such a repository")


class AuthConfig(Strict):
    mode: Literal["open", "keys", "modelscope"] = Field(
        "open",
        description="open: every distinct key is its own tenant, loopback only; keys: those that "
        "`twinkle-serve keys` gave out; modelscope: tokens of members of an organisation",
    )
    allow_public: bool = Field(False, description="let mode open listen on an address that is not loopback")
    modelscope: ModelScopeConfig = ModelScopeConfig()

    @model_validator(mode="after")
    def _somebody_may_come_in(self) -> AuthConfig:
        gate = self.modelscope
        if self.mode == "modelscope" and gate.marker_repo is None and not gate.allow_users:
            raise ValueError("mode modelscope needs modelscope.marker_repo or modelscope.allow_users")
        return self


class StorageConfig(Strict):
    root: Path = Field(
        Path("twinkle-data"),
        description="directory of all that must last: checkpoints, databases, snapshots, secrets",
    )
    catalog_url: str | None = Field(
        None, description="SQLAlchemy URL of the catalogue; null: SQLite below root"
    )
    journal_url: str | None = Field(
        None, description="SQLAlchemy URL of the journal of accepted requests; null: SQLite below root"
    )
    journal_sync: Literal["FULL", "NORMAL"] = Field(
        "FULL",
        description="SQLite only. FULL: an accepted request survives a power cut; NORMAL: any death of a "
        "process, but maybe not the last moments before a power cut",
    )
    journal_max_bytes: int = Field(
        16 * 2**30, ge=2**20, description="journal size at which training requests must wait, bytes"
    )
    checkpoints_max_bytes: int = Field(
        2**42, ge=2**20, description="all checkpoints together; at the limit saves fail, bytes"
    )
    disk_reserve_bytes: int = Field(
        2**30,
        ge=0,
        description="saves fail and new runs are put off while the disk has less left than this, so that "
        "training can go on, bytes",
    )
    snapshot_every_steps: int = Field(
        50, ge=1, description="a run is written to disk after so many optimizer steps, in the background"
    )
    snapshot_every_s: float = Field(
        60.0, gt=0, description="and when something in it is not on disk for so long, seconds"
    )
    snapshot_replay_s: float = Field(
        10.0,
        gt=0,
        description="and when it has the largest part of what a dead group would do again, and all of that "
        "would take so long, seconds; less often where snapshots would hold up more than 2 % of the work",
    )


class TenantLimits(Strict):
    """What one tenant may use. At a limit its clients wait and are told why; nothing accepted fails."""

    weight: float = Field(1.0, gt=0, le=1000, description="share of a busy server, beside the others'")
    tokens_per_s: float = Field(
        1e6, gt=0, description="tokens trained on, read and drawn, averaged over token_burst_s"
    )
    token_burst_s: float = Field(
        60.0, gt=0, description="so many seconds of tokens_per_s may be used at once after a pause"
    )
    pending_requests: int = Field(16_384, ge=1, description="accepted requests without a result yet")
    pending_bytes: int = Field(
        8 * 2**30,
        ge=2**20,
        description="data and prompts of accepted requests without a result yet, and what samples among them "
        "ask about their prompts, bytes",
    )
    live_runs: int = Field(256, ge=1, description="runs with an adapter; the creation of further ones waits")
    sessions: int = Field(4096, ge=1, description="active sessions; further ones wait until some end")
    checkpoint_bytes: int = Field(
        2**40, ge=2**20, description="size of all checkpoints; at the limit saves wait until some are deleted"
    )
    http_requests: int = Field(
        8192, ge=4, description="HTTP requests being answered by one ingress replica, held polls included"
    )
    body_bytes: int | None = Field(
        None, ge=2**10, description="largest body, bytes, decompressed; null: http.max_body_bytes"
    )
    bodies_bytes: int = Field(
        2**30,
        ge=2**20,
        description="bodies being read by one ingress replica; further ones stand in line, bytes",
    )
    sequence_tokens: int | None = Field(
        None, ge=1, description="longest sequence in training and sampling, tokens; null: the model's limit"
    )
    datums: int | None = Field(
        None, ge=1, description="datums of one request; null: limits.max_datums_per_request"
    )


class LimitsConfig(Strict):
    result_retention_s: float = Field(1800.0, gt=0, description="finished results can be polled this long")
    results_max_bytes: int = Field(
        4 * 2**30,
        ge=2**20,
        description="memory for finished results, in equal parts for all tenants that have some; above it "
        "new requests of those with more than their part wait, and of their results the oldest that were "
        "fetched, and then the oldest of samples, go before their time, bytes",
    )
    session_expiry_s: float = Field(
        600.0, ge=120, description="a session without heartbeat expires after this"
    )
    run_retention_s: float | None = Field(
        7 * 86400.0,
        gt=0,
        description="a run whose session has expired is unloaded, and leaves the disk, when nothing was "
        "heard of both for so long; null: never. One of a finished session is unloaded at once. Checkpoints "
        "stay. Seconds",
    )
    sample_abandon_s: float = Field(
        120.0, gt=0, description="a sample that nobody polled for so long is dropped; a held poll counts"
    )
    parked_bytes_per_run: int = Field(
        2**30, ge=2**20, description="training data that may wait for an earlier request of its run, bytes"
    )
    max_datums_per_request: int = Field(65_536, ge=1, description="datums of one forward or backward pass")
    max_num_samples: int = Field(256, ge=1, description="num_samples of one request")
    sampler_snapshots_per_run: int = Field(4, ge=1, description="newest ephemeral snapshots kept per run")
    tenant: TenantLimits = TenantLimits()
    tenants: dict[str, TenantLimits] = Field(
        default_factory=dict,
        description="limits of single tenants, which else are those of `tenant`; by the name in "
        "`twinkle-serve keys`, the ModelScope user name, or the tenant's id (a run's model_owner)",
    )

    @model_validator(mode="before")
    @classmethod
    def _what_is_not_said_is_as_for_all(cls, tree: Any) -> Any:
        named = tree.get("tenants") if isinstance(tree, dict) else None
        common = tree.get("tenant") if isinstance(tree, dict) else None
        if not isinstance(named, dict) or not isinstance(common, dict):
            return tree
        merged = {name: common | own if isinstance(own, dict) else own for name, own in named.items()}
        return tree | {"tenants": merged}

    def of(self, *names: str) -> TenantLimits:
        """Those of the tenant with these names, its id included."""
        return next((self.tenants[name] for name in names if name in self.tenants), self.tenant)


class RayConfig(Strict):
    dashboard: bool = Field(False, description="start Ray's dashboard with `up`")
    dashboard_port: int = Field(8265, ge=1, le=65535, description="its TCP port, on the loopback address")
    metrics_port: int | None = Field(
        None, ge=1, le=65535, description="with `up`: port of the Prometheus metrics; null: a free one"
    )
    orphan_exit_s: float = Field(
        120.0,
        gt=0,
        description="the coordinator and its ranks end when no ingress replica lived so long, seconds",
    )


class MonitoringConfig(Strict):
    log_file: Path | None = Field(
        None, description="each process of the service appends JSON lines to this file; null: text on stderr"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="of the service's own loggers; DEBUG has a line for each request that succeeds"
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://",
        description="spans go there by OTLP over HTTP, e.g. http://127.0.0.1:4318/v1/traces; null: nowhere",
    )


class ConsoleConfig(Strict):
    enabled: bool = Field(True, description="serve the web page below /console")
    operators: list[str] = Field(
        default_factory=list,
        description="names of the callers who see the whole service there; with auth.mode open on a loopback "
        "address everybody does",
    )
    session_hours: float = Field(12.0, gt=0, le=720, description="how long a sign-in lasts, hours")


class Config(Strict):
    models: Annotated[list[ModelConfig], Field(min_length=1)]
    http: HttpConfig = HttpConfig()
    auth: AuthConfig = AuthConfig()
    storage: StorageConfig = StorageConfig()
    limits: LimitsConfig = LimitsConfig()
    losses: LossesConfig = LossesConfig()
    ray: RayConfig = RayConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    console: ConsoleConfig = ConsoleConfig()

    @model_validator(mode="after")
    def _names_are_unique(self) -> Config:
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError(f"models: names must be unique, got {names}")
        return self

    @model_validator(mode="after")
    def _open_is_private(self) -> Config:
        if self.auth.mode == "open" and not self.auth.allow_public and not is_loopback(self.http.host):
            raise ValueError(
                f"auth.mode open lets anybody in, so http.host {self.http.host} must be a loopback address; "
                "auth.allow_public=true overrides this"
            )
        return self

    def resolved(self, base: Path) -> Config:
        """The same with paths made absolute: relative ones are taken from the directory ``base``."""
        root = base / self.storage.root.expanduser()
        models = [_with_absolute_paths(model, base) for model in self.models]
        storage = self.storage.model_copy(update={"root": root})
        log_file = self.monitoring.log_file
        monitoring = self.monitoring.model_copy(
            update={"log_file": None if log_file is None else base / log_file.expanduser()}
        )
        losses = self.losses.resolved(base)
        changed = {"models": models, "storage": storage, "monitoring": monitoring, "losses": losses}
        return self.model_copy(update=changed)


def _with_absolute_paths(model: ModelConfig, base: Path) -> ModelConfig:
    changed: dict[str, Any] = {}
    if "://" not in model.path:
        changed["path"] = _absolute(base, model.path)
    if model.page_dir is not None:
        changed["page_dir"] = base / model.page_dir.expanduser()
    return model.model_copy(update=changed)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and apply ``dotted.key=value`` overrides (values are YAML; list items by index).

    The file is our configuration, or a ``serve deploy`` file with it in the application's ``args``. Relative
    paths in it are taken from the current directory. Raises OSError, or ValueError (pydantic's
    ValidationError included) naming the key that is wrong.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: a mapping of settings is expected")
    if "applications" in tree:
        tree = from_serve_file(tree)
    for override in overrides or []:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"--set {override!r}: expected dotted.key=value")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--set {override!r}: the value is not YAML; quote it") from None
        _assign(tree, key.split("."), parsed, override)
    return Config.model_validate(tree).resolved(Path.cwd())


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _absolute(base: Path, path: str) -> str:
    return os.path.normpath(base / Path(path).expanduser())


def _assign(node: Any, keys: list[str], value: Any, override: str) -> None:
    *parents, last = keys
    for key, following in zip(parents, keys[1:], strict=True):
        node = _child(node, key, [] if following.isdigit() else {}, override)
    if isinstance(node, list):
        _child(node, last, None, override)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ValueError(f"--set {override!r}: {last!r} is below a plain value")


def _child(node: Any, key: str, default: Any, override: str) -> Any:
    if isinstance(node, list):
        if not key.isdigit() or int(key) > len(node):
            raise ValueError(f"--set {override!r}: {key!r} is not an index up to {len(node)}")
        if int(key) == len(node):
            node.append(default)
        return node[int(key)]
    if not isinstance(node, dict):
        raise ValueError(f"--set {override!r}: {key!r} is below a plain value")
    if node.get(key) is None:
        node[key] = default
    return node[key]
