"""ModelScope Twinkle 0.5.1 on this machine's CPU, on the loopback address: installed once, started for a
while.

``python -m benchmarks.peers.twinkle`` makes its environment (about 2 GB, minutes). Knows how that release is
configured, and the three places where it takes a GPU for granted. Does not know what is asked of it.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import TreeClock, end_tree
from benchmarks.peers.environment import Environment, NotInstallable, start, wait_for
from twinkle_serve.testing.server import free_port

MODEL = "bench/tiny-moe"
PACKAGES = (
    "torch==2.13.0",
    "twinkle-kit==0.5.1",
    "tinker==0.16.1",
    "transformers==4.57.*",
    "ray[serve]==2.60.0",
)
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


ENVIRONMENT = Environment("twinkle-kit 0.5.1", Path(".peers/twinkle"), PACKAGES, "2 GB", make_fit)


@contextmanager
def running_twinkle(python: Path, model: Path, scratch: Path) -> Iterator[tuple[str, TreeClock]]:
    """Serve ``model`` as MODEL; yields the address and a clock of the server's CPU time. Raises
    NotStarted."""
    scratch.mkdir(parents=True, exist_ok=True)
    port = free_port()
    (scratch / "twinkle.yaml").write_text(yaml.safe_dump(_configuration(model.resolve(), port)))
    variables = os.environ | _variables(scratch)
    started: list[subprocess.Popen[bytes]] = []
    try:
        ray_port = free_port()
        started.append(
            start([str(python.parent / "ray"), *_ray_options(ray_port)], scratch / "ray.log", variables)
        )
        wait_for("Ray runtime started", scratch / "ray.log", started[-1], who="Twinkle")
        variables["RAY_ADDRESS"] = f"127.0.0.1:{ray_port}"
        command = [str(python), "-m", "twinkle.server", "launch", "--config", str(scratch / "twinkle.yaml")]
        started.append(start(command, scratch / "server.log", variables, scratch))
        wait_for("All applications started", scratch / "server.log", started[-1], who="Twinkle")
        yield f"http://127.0.0.1:{port}", TreeClock(started[0].pid)
    finally:
        for process in reversed(started):
            end_tree(process)


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


if __name__ == "__main__":
    ENVIRONMENT.main()
