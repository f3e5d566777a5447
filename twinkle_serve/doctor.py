"""Looks at this machine with the eyes of a configuration: what will go wrong at the start, and what later.

Knows ports, disks, devices, versions and model files. Starts and changes nothing, and imports neither torch
nor ray. How much memory a model takes is `plan`'s to say.
"""

from __future__ import annotations

import json
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from packaging.requirements import Requirement

from twinkle_serve.cluster.devices import devices
from twinkle_serve.cluster.haproxy import NoHaproxy, environment
from twinkle_serve.config import Config, ModelConfig
from twinkle_serve.model_files import INDEX, DamagedModel, check_whole, has_weights, weight_files

_MIN_FREE_BYTES = 2**30
_MIN_SHARED_BYTES = 2**30
_MIN_OPEN_FILES = 4096
_DISTRIBUTION = "twinkle-serve"


@dataclass(frozen=True, slots=True)
class Finding:
    """level: "ok", "warn" (it may do) or "bad" (it will not)."""

    level: str
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<5}{self.what:<10}{self.text}"


def examine(config: Config) -> Iterator[Finding]:
    """All findings, in the order in which things would fail."""
    checks: tuple[Callable[[Config], Iterator[Finding]], ...] = (
        _python,
        _packages,
        _ports,
        _proxy,
        _disk,
        _log_file,
        _pages,
        _databases,
        _machine,
        _devices,
        _models,
    )
    for check in checks:
        yield from check(config)


def before_start(config: Config) -> Iterator[Finding]:
    """What would fail at once, and costs nothing to look at."""
    yield _port("http.port", config.http.host, config.http.port)
    yield _writable("storage.root", config.storage.root)
    yield from _log_file(config)


def _python(config: Config) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding(
        "ok" if sys.version_info >= (3, 11) else "bad", "python", f"{version}; 3.11 or newer is needed"
    )


def _packages(config: Config) -> Iterator[Finding]:
    extras = ["sharding"] if any(model.ranks > 1 for model in config.models) else []
    extras += ["otel"] if config.monitoring.otlp_endpoint else []
    shown = []
    for text in metadata.requires(_DISTRIBUTION) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ["", *extras]):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("bad", "packages", f"{requirement.name} is not installed; {text} is needed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield Finding("bad", "packages", f"{requirement.name} {version} is installed; {text} is needed")
        if requirement.name in ("ray", "torch", "transformers", "deepspeed"):
            shown.append(f"{requirement.name} {version}")
    yield Finding("ok", "packages", ", ".join(shown))


def _ports(config: Config) -> Iterator[Finding]:
    yield _port("http.port", config.http.host, config.http.port)
    if config.ray.dashboard:
        yield _port("ray.dashboard_port", "127.0.0.1", config.ray.dashboard_port)
    if config.ray.metrics_port is not None:
        yield _port("ray.metrics_port", "127.0.0.1", config.ray.metrics_port)


def _port(name: str, host: str, port: int) -> Finding:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Finding("bad", "ports", f"{name} {port} on {host} cannot be used: {error.strerror}")
    return Finding("ok", "ports", f"{name} {port} on {host} is free")


def _proxy(config: Config) -> Iterator[Finding]:
    if config.http.proxy == "haproxy":
        try:
            environment(Path(tempfile.gettempdir()))
        except NoHaproxy as error:
            yield Finding("bad", "proxy", str(error))


def _writable(name: str, directory: Path) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=_existing(directory)):
            pass
    except OSError as error:
        return Finding("bad", "disk", f"{name} {directory} cannot be written: {error.strerror}")
    return Finding("ok", "disk", f"{name} {directory} can be written")


def _log_file(config: Config) -> Iterator[Finding]:
    file = config.monitoring.log_file
    if file is None:
        return
    finding = _writable("monitoring.log_file", file)
    try:
        if file.exists():
            file.open("ab").close()  # its directory need not be ours
            finding = Finding("ok", "disk", f"monitoring.log_file {file} can be written")
    except OSError as error:
        finding = Finding("bad", "disk", f"monitoring.log_file {file} cannot be written: {error.strerror}")
    yield finding


def _disk(config: Config) -> Iterator[Finding]:
    root = config.storage.root
    finding = _writable("storage.root", root)
    if finding.level == "bad":
        yield finding
        return
    free = shutil.disk_usage(_existing(root)).free
    wanted = config.storage.journal_max_bytes
    text = f"{_gb(free)} free below storage.root {root}"
    if free < _MIN_FREE_BYTES:
        yield Finding("bad", "disk", f"{text}; at least {_gb(_MIN_FREE_BYTES)} are needed")
    elif free < wanted:
        yield Finding("warn", "disk", f"{text}; journal_max_bytes allows {_gb(wanted)} without checkpoints")
    else:
        yield Finding("ok", "disk", text)


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there and may be looked at."""

    def is_there(place: Path) -> bool:
        try:
            return place.exists()
        except OSError:
            return False

    return next(place for place in [path, *path.parents] if is_there(place))


def _pages(config: Config) -> Iterator[Finding]:
    """Room for paged adapters, on this machine; ranks may be on others."""
    wanted: dict[Path, int] = {}
    for model in config.models:
        directory = model.page_dir or Path(tempfile.gettempdir())
        most = model.disk_page_bytes * model.groups * model.ranks
        wanted[directory] = wanted.get(directory, 0) + most
    for directory, size in wanted.items():
        free = shutil.disk_usage(_existing(directory)).free
        text = f"{_gb(free)} free below {directory} for paged adapters (models.N.page_dir)"
        if free < size:
            yield Finding("warn", "pages", f"{text}; disk_page_bytes of all ranks allow {_gb(size)}")
        else:
            yield Finding("ok", "pages", text)


def _databases(config: Config) -> Iterator[Finding]:
    for name in ("catalog_url", "journal_url"):
        url = getattr(config.storage, name)
        if url is not None:
            yield _database(f"storage.{name}", url)


def _database(name: str, url: str) -> Finding:
    import sqlalchemy as sa

    try:
        engine = sa.create_engine(url)
        with engine.connect():
            pass
        engine.dispose()
    except Exception as error:  # each driver has errors of its own
        reason = str(error).splitlines()[0]
        return Finding("bad", "database", f"{name} cannot be opened: {type(error).__name__}: {reason}")
    return Finding("ok", "database", f"{name} can be opened")


def _machine(config: Config) -> Iterator[Finding]:
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").exists() else 0
    text = f"{_gb(shared)} of shared memory in /dev/shm"
    if shared < _MIN_SHARED_BYTES:
        yield Finding("warn", "memory", f"{text}: Ray will use the disk (docker: --shm-size)")
    else:
        yield Finding("ok", "memory", text)
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < _MIN_OPEN_FILES:
        advice = f"each waiting client holds one; raise it with `ulimit -n {_MIN_OPEN_FILES}` (limit {most})"
        yield Finding("warn", "files", f"{files} open files allowed: {advice}")
    else:
        yield Finding("ok", "files", f"{files} open files allowed")


def _devices(config: Config) -> Iterator[Finding]:
    gpus = gpu_names()
    for name in gpus:
        yield Finding("ok", "gpus", name)
    chosen = devices(config.models, len(gpus))
    needed = sum(model.ranks * model.groups for model in config.models if chosen[model.name] == "cuda")
    if needed > len(gpus):
        text = f"{needed} ranks are to run on GPUs (models.N.device), but this machine has {len(gpus)}"
        yield Finding("warn", "gpus", f"{text}: the cluster's other nodes must have the rest")
    left = [model.name for model in config.models if model.device == "auto" and chosen[model.name] == "cpu"]
    if gpus and left:
        text = f"{', '.join(left)}: too few are left by the models before, so this runs on the CPU"
        yield Finding("warn", "gpus", f"{text}, unless other nodes have some")
    if not gpus and not needed:
        yield Finding("ok", "gpus", "none; models run on the CPU in float32")


def gpu_names() -> list[str]:
    """Each GPU's name and memory, as the driver tells it; none without a driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _models(config: Config) -> Iterator[Finding]:
    for model in config.models:
        if "://" in model.path:
            text = f"{model.name}: {model.path} is fetched from ModelScope at the first start"
            missing = util.find_spec("modelscope") is None
            yield Finding("bad" if missing else "ok", "model", text)
        else:
            try:
                yield from _model(model, Path(model.path))
            except OSError as error:
                text = f"{model.name}: {error.filename or model.path} cannot be read: {error.strerror}"
                yield Finding("bad", "model", text)


def _model(model: ModelConfig, directory: Path) -> Iterator[Finding]:
    if not directory.is_dir():
        yield Finding("bad", "model", f"{model.name}: {directory} is not a directory")
        return
    problems = [*_config_problems(directory), *_weight_problems(directory)]
    for problem in problems:
        yield Finding("bad", "model", f"{model.name}: {problem}")
    if not (directory / "tokenizer.json").is_file():
        text = "no tokenizer.json: clients cannot get_tokenizer(), and /v1 cannot take text"
        yield Finding("warn", "model", f"{model.name}: {text}")
    if not problems:
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        yield Finding("ok", "model", f"{model.name}: {_gb(size)} of weights in {directory}, all whole")


def _config_problems(directory: Path) -> Iterator[str]:
    try:
        tree = json.loads((directory / "config.json").read_text())
        if not tree.get("architectures"):
            yield "config.json names no architecture"
    except OSError:
        yield "there is no config.json"
    except (ValueError, AttributeError):
        yield "config.json is not a JSON object"


def _weight_problems(directory: Path) -> Iterator[str]:
    """A download that was cut off is found here rather than after minutes of loading."""
    try:
        wanted = weight_files(directory) if has_weights(directory) else []
    except DamagedModel:
        yield f"{INDEX} cannot be read"
        return
    # Of others that transformers may read, at least that they are whole.
    wanted = wanted or sorted(file.name for file in directory.glob("*.safetensors"))
    if not wanted:
        yield "there are no *.safetensors files"
    for name in wanted:
        if not (directory / name).is_file():
            yield f"{name} is missing"
            continue
        try:
            check_whole(directory / name)
        except DamagedModel as error:
            yield str(error)


def _gb(amount: float) -> str:
    return f"{amount / 1e9:.3g} GB"


def verdict(findings: list[Finding]) -> str | None:
    """One line about what is bad, or None."""
    bad = [finding for finding in findings if finding.level == "bad"]
    if not bad:
        return None
    return f"{len(bad)} problem{'s' if len(bad) > 1 else ''}; the service would not start"
