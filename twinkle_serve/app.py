"""The Ray Serve application: the whole wiring on one screen.

Knows which parts exist and how they are joined. Does not know what any of them does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.context import _get_global_client

from twinkle_serve.cluster.deployment import Deployment
from twinkle_serve.config import Config, load_config

# Waiting polls hold no CPU; a replica is a decoder of JSON and protobuf with many open connections.
MAX_OPEN_REQUESTS = 10_000
SHUTDOWN_S = 5.0


def build_app(config: Config | dict[str, Any] | str | Path) -> Application:
    """The application of ``config``: a tree, the path of a YAML file, or a Config.

    For a ``serve deploy`` file: ``import_path: twinkle_serve.app:build_app``, ``args: {our configuration}``.
    """
    if isinstance(config, str | Path):
        config = load_config(config)
    elif isinstance(config, dict):
        config = Config.model_validate(config).resolved(Path.cwd())
    deployment = Deployment(_as_bound(config))

    def asgi_app() -> Any:
        return ingress_app(deployment)

    ingress = serve.deployment(
        serve.ingress(asgi_app)(),
        name="ingress",
        num_replicas=deployment.config.http.replicas,
        max_ongoing_requests=MAX_OPEN_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=SHUTDOWN_S,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config={"enable_access_log": False},
    )
    return ingress.bind()


def _as_bound(config: Config) -> Config:
    """The configuration with the address that a running Serve really listens on.

    ``serve deploy`` and ``serve run`` choose it outside of our configuration. Raises ValueError where
    ``auth.mode: open`` would let the network in.
    """
    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    if client is None:
        return config
    tree = config.model_dump()
    tree["http"] |= {"host": client.http_config.host, "port": client.http_config.port}
    return Config.model_validate(tree)


def ingress_app(deployment: Deployment) -> Any:
    """What one ingress replica runs: the gateway in front of the coordinator."""
    from twinkle_serve.cluster.client import CoordinatorClient, resolve
    from twinkle_serve.cluster.metrics import RayMeter
    from twinkle_serve.cluster.serve_binding import bind_to_node_address
    from twinkle_serve.cluster.tracing import span_exporter
    from twinkle_serve.console.app import add_console
    from twinkle_serve.gateway.app import create_app
    from twinkle_serve.logs import configure_logs
    from twinkle_serve.storage.secret import shared_secret

    config = deployment.config
    bind_to_node_address()
    configure_logs(config.monitoring, "ingress")
    client = CoordinatorClient(deployment)
    app = create_app(
        lambda: client.backend,
        config,
        resolve=resolve,
        signing_secret=shared_secret(config.storage.root),
        meter=RayMeter(),
        export_span=span_exporter(config.monitoring.otlp_endpoint, "ingress"),
    )
    add_console(app)
    app.router.lifespan_context = client.attached
    return app
