"""ModelScope Twinkle 0.5.1 on this machine's CPU, on the loopback address: installed once, started for a
while.

``python -m benchmarks.peers.twinkle DIRECTORY`` makes its environment (about 2 GB, minutes). Knows how that
release is configured, and the three places where it takes a GPU for granted. Does not know what is asked of
it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import TreeClock, tree_of
from twinkle_serve.testing.server import free_port

DIRECTORY = Path(".peers/twinkle")
MODEL = "bench/tiny-moe"
PACKAGES = (
    "torch==2.13.0",
    "twinkle-kit==0.5.1",
    "tinker==0.16.1",
    "transformers==4.57.*",
    "ray[serve]==2.60.0",
)
_STAMP = "ready-for-cpu"
_GPU_MODULE = "twinkle/utils/platforms/gpu.py"
_ON_CPU = {
    "return 'cuda'": "return 'cpu'",
    "return f'cuda:{idx}'": "return 'cpu'",
    "return 'nccl'": "return 'gloo'",
}
_RNG = """
import torch
torch.cpu.get_rng_state = torch.get_rng_state
torch.cpu.set_rng_state = torch.set_rng_state
"""
# The same shape as testing.models.build_tiny_qwen3_moe, written by the older release that Twinkle works with.
_BUILD = """
import sys, torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
torch.manual_seed(0)
config = Qwen3MoeConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    vocab_size=350, intermediate_size=128, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
    norm_topk_prob=True, tie_word_embeddings=False, rope_theta=1e6, max_position_embeddings=512)
Qwen3MoeForCausalLM(config).save_pretrained(sys.argv[1])
"""
_START_S = 300.0


class NotInstallable(Exception):
    """Why there is nothing to compare with, in one line."""


def installed(directory: Path = DIRECTORY) -> Path:
    """The interpreter of an environment that is there. Raises NotInstallable with the reason why it is
    not."""
    if (directory / _STAMP).exists():
        return python_of(directory)
    why = directory.with_suffix(".why")
    raise NotInstallable(why.read_text() if why.exists() else "not installed: `make peers` does it (2 GB)")


def python_of(directory: Path) -> Path:
    return directory.resolve() / "bin" / "python"


def install(directory: Path = DIRECTORY) -> Path:
    """Make the environment if it is not there; returns its interpreter. Raises NotInstallable."""
    python = python_of(directory)
    if (directory / _STAMP).exists():
        return python
    shutil.rmtree(directory, ignore_errors=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True, capture_output=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--progress-bar", "off", *PACKAGES]
        subprocess.run(pip, check=True, capture_output=True, text=True)
    except (subprocess.CalledProcessError, OSError) as error:
        last = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1:]
        raise NotInstallable(f"twinkle-kit 0.5.1 cannot be installed here: {' '.join(last)[:200]}") from None
    make_fit(directory)
    return python


def make_fit(directory: Path) -> None:
    """Let the installed release run without a GPU: its backends have a class for GPUs and none for CPUs, so
    that class must name the CPU. Raises NotInstallable if the release is not the one this was written for."""
    (module,) = directory.glob(f"lib/python*/site-packages/{_GPU_MODULE}")
    text = module.read_text()
    for theirs, ours in _ON_CPU.items():
        if theirs not in text:
            raise NotInstallable(f"{_GPU_MODULE} of the installed twinkle-kit has no {theirs!r}")
        text = text.replace(theirs, ours)
    module.write_text(text + _RNG)
    (directory / _STAMP).touch()


def build_model(python: Path, tokenizer_from: Path, directory: Path) -> Path:
    """A tiny Qwen3-MoE that both releases of transformers read, with the tokenizer of another directory."""
    if not (directory / "config.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        for path in tokenizer_from.glob("*token*"):
            shutil.copy(path, directory)
        subprocess.run(
            [str(python), "-W", "ignore", "-c", _BUILD, str(directory)], check=True, capture_output=True
        )
    return directory


@contextmanager
def running_twinkle(python: Path, model: Path, scratch: Path) -> Iterator[tuple[str, TreeClock]]:
    """Serve ``model`` as MODEL; yields the address and a clock of the server's CPU time. Raises RuntimeError
    with the end of its log if it does not start."""
    scratch.mkdir(parents=True, exist_ok=True)
    port = free_port()
    (scratch / "twinkle.yaml").write_text(yaml.safe_dump(_configuration(model.resolve(), port)))
    variables = os.environ | _variables(scratch)
    started: list[subprocess.Popen[bytes]] = []
    try:
        ray_port = free_port()
        started.append(
            _start([str(python.parent / "ray"), *_ray_options(ray_port)], scratch / "ray.log", variables)
        )
        _wait_for("Ray runtime started", scratch / "ray.log", started[-1])
        variables["RAY_ADDRESS"] = f"127.0.0.1:{ray_port}"
        command = [str(python), "-m", "twinkle.server", "launch", "--config", str(scratch / "twinkle.yaml")]
        started.append(_start(command, scratch / "server.log", variables, scratch))
        _wait_for("All applications started", scratch / "server.log", started[-1])
        yield f"http://127.0.0.1:{port}", TreeClock(started[0].pid)
    finally:
        for process in reversed(started):
            _end(process)


def _ray_options(port: int) -> list[str]:
    return [
        *("start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"),
        *("--num-cpus=64", "--num-gpus=0", "--include-dashboard=false", "--disable-usage-stats"),
        "--object-store-memory=300000000",
    ]


def _variables(scratch: Path) -> dict[str, str]:
    return {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TWINKLE_TRUST_REMOTE_CODE": "0",
        "TWINKLE_DEFAULT_SAVE_DIR": str(scratch.resolve() / "outputs"),
        "RAY_memory_monitor_refresh_ms": "0",
        # Makes Ray listen on 127.0.0.1 only.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(24),
    }


def _configuration(model: Path, port: int) -> dict[str, Any]:
    """Its fastest form: state in memory, limits out of the way, one rank on one thread."""
    cpu = {"device_type": "CPU", "dp_size": 1}
    no_limits = {"rps_limit": 10_000, "tps_limit": 100_000_000}
    in_worker = {
        "TWINKLE_TRUST_REMOTE_CODE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    model_arguments = {
        "backend": "transformers",
        "model_id": str(model),
        "nproc_per_node": 1,
        "max_loras": 10,
        "adapter_config": {"adapter_timeout": 600, "adapter_max_lifetime": 36_000},
        "device_group": {"name": "model", "ranks": 1, "device_type": "CPU"},
        "device_mesh": cpu,
        "queue_config": no_limits,
    }
    gateway = {"server_config": {"per_token_model_limit": 30}, "supported_models": [MODEL]}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "persistence": {"mode": "memory"},
        "applications": [
            _application("server", "/api/v1", "server", gateway, "GatewayServer"),
            _application(
                "model", f"/api/v1/model/{MODEL}", "model", model_arguments, "ModelManagement", in_worker
            ),
        ],
    }


def _application(
    name: str,
    prefix: str,
    target: str,
    arguments: Mapping[str, Any],
    deployment: str,
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    resources: dict[str, Any] = {"num_cpus": 0.1}
    if variables:
        resources["runtime_env"] = {"env_vars": dict(variables)}
    scaling = {"min_replicas": 1, "max_replicas": 1, "target_ongoing_requests": 128}
    return {
        "name": name,
        "route_prefix": prefix,
        "import_path": target,
        "args": dict(arguments),
        "deployments": [
            {
                "name": deployment,
                "max_ongoing_requests": 200,
                "autoscaling_config": scaling,
                "ray_actor_options": resources,
            }
        ],
    }


def _start(
    command: list[str], log: Path, variables: Mapping[str, str], directory: Path | None = None
) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=variables, cwd=directory
        )


def _wait_for(words: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _START_S
    while words not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > until:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"Twinkle did not start:\n{tail}")
        time.sleep(0.3)


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all its children; it leaves some behind when asked to stop."""
    for pid in tree_of(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else DIRECTORY
    try:
        print(install(where))
    except NotInstallable as error:
        where.parent.mkdir(parents=True, exist_ok=True)
        where.with_suffix(".why").write_text(str(error))
        sys.exit(str(error))
