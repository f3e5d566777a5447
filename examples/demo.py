"""`make demo`: a server and a client on this machine, and a real model that learns its name in between.

Builds SmolLM2-135M-Instruct if it is not there yet, starts `twinkle-serve up` on a free port, runs
self_cognition.py against it in a second process, and fails unless the answer names the new identity.
`python examples/demo.py OUTPUT --epochs 1` passes what comes after the directory on to self_cognition.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from twinkle_serve.testing.server import RunningServer, running_server

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
NAME = "Twinkle"


def build_model() -> str:
    """The directory of the base model; built in a process of its own, so that torch leaves our memory."""
    command = [sys.executable, "-m", "twinkle_serve.testing.models", "smollm2", str(REPOSITORY / "models")]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return output.splitlines()[-1]


def run_client(server: RunningServer, output: Path, options: list[str]) -> list[str]:
    """Run the example as a user would, showing its output; returns its lines."""
    command = [sys.executable, str(HERE / "self_cognition.py"), "--base-url", server.url]
    command += ["--model", MODEL, "--name", NAME, "--output", str(output), *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    lines = []
    client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert client.stdout is not None
        for line in client.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
        client.wait()
    finally:
        client.kill()  # an interrupted demo must not leave it asking a server that is gone
    if client.returncode != 0:
        sys.exit(f"self_cognition.py exited with {client.returncode}; the server's log is {server.log}")
    return lines


def main(output: Path, options: list[str]) -> None:
    output = output.absolute()
    os.chdir(REPOSITORY)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the server is stopped, too
    output.mkdir(parents=True, exist_ok=True)
    print("== base model: SmolLM2-135M-Instruct", flush=True)
    path = build_model()
    print(f"{path}\n== server: twinkle-serve up deployments/local.yaml", flush=True)
    started = time.monotonic()
    settings = [f"models.0.name={MODEL}", f"models.0.path={path}", f"storage.root={output / 'server'}"]
    with running_server(Path("deployments/local.yaml"), settings, log=output / "server.log") as server:
        print(f"ready at {server.url}, log in {server.log}", flush=True)
        print("== client: examples/self_cognition.py", flush=True)
        lines = run_client(server, output, options)
    print(f"== done in {time.monotonic() - started:.0f} s")
    after = [line for line in lines if line.startswith("after:")]
    if not (after and NAME in after[0]):
        sys.exit(f"the model did not learn its name {NAME}: {after}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output"), sys.argv[2:])
