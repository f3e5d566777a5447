"""``python -m benchmarks.compare VARIABLE=VALUE ...``: one server as it is and one with these environment
variables, stepped in turn; latency of each operation and CPU a step, as ratios. For trying settings of Ray
and Serve.

Knows nothing of what the variables mean. The engine computes nothing unless ``--model`` names a directory.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.clients import Clients, clients_of
from benchmarks.measure import in_turn, ratio
from benchmarks.services import MODEL, Service, our_server

STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variables", nargs="+", metavar="VARIABLE=VALUE")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--model", type=Path, help="a model's directory; without it, no model")
    options = parser.parse_args()
    environment = dict(variable.split("=", 1) for variable in options.variables)
    path, module = options.model or Path("none"), None if options.model else "benchmarks.null_engine"
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as logs,
        our_server(path, module=module) as before,
        our_server(path, module=module, environment=environment) as after,
        clients_of(before.url, MODEL, log=Path(logs) / "before") as on_before,
        clients_of(after.url, MODEL, log=Path(logs) / "after") as on_after,
    ):
        for clients in (on_before, on_after):
            clients.open(1)
            clients.train([0], tokens=options.tokens, depth=0, steps=STEPS)
        found = in_turn(
            {
                "before": lambda: measured(on_before, before, options.tokens),
                "after": lambda: measured(on_after, after, options.tokens),
            },
            rounds=options.rounds,
            seconds=600,
        )
    for what in ("forward_backward", "optim_step", "cpu"):
        old, new = ([each[what] for each in found[arm]] for arm in ("before", "after"))
        print(
            f"{what:>18}: {1000 * statistics.median(old):7.2f} ms before, "
            f"{1000 * statistics.median(new):7.2f} ms after, {ratio(new, old):.3f} times"
        )


def measured(clients: Clients, server: Service, tokens: int) -> dict[str, Any]:
    """Medians of one round, seconds."""
    used = server.clock.seconds()
    (tenant,) = clients.train([0], tokens=tokens, depth=0, steps=STEPS)["tenants"]
    found = {name: statistics.median(tenant[name]) for name in ("forward_backward", "optim_step")}
    return found | {"cpu": (server.clock.seconds() - used) / STEPS}


if __name__ == "__main__":
    main()
