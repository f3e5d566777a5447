"""The hosted service's own program with its real client, in environments of its own, and its twin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from twinkle_serve.testing.cache import build_once
from twinkle_serve.testing.server import RunningServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
EPOCHS = 40
EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "modelscope"
NEEDS_KITS = pytest.mark.skipif(
    "TWINKLE_KITS" not in os.environ, reason="make modelscope downloads both kits (1 GB)"
)


def kit(root: Path, version: str, tinker: str) -> Path:
    """The Python of an environment with that twinkle-kit; what it does not pin it shares with this one."""

    def install(directory: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        packages = next(directory.glob("lib/python3*/site-packages"))
        own = next(Path(sys.prefix).glob("lib/python3*/site-packages"))
        (packages / "shared.pth").write_text(f"{own}\n")
        pip = [directory / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, f"twinkle-kit=={version}", f"tinker=={tinker}", "accelerate"], check=True)

    return build_once(root, f"kit-{version}-{tinker}", install) / "bin" / "python"


def learn(python: str | Path, program: str, server: RunningServer, model: Path, key: str) -> str:
    """The answer to "Who are you?" afterwards, which begins as in the data; before, it is anything."""
    environment = {
        "TWINKLE_SERVER_URL": server.url,
        "TWINKLE_SERVER_TOKEN": key,
        "TWINKLE_MODEL": "llama",
        "TWINKLE_TOKENIZER": str(model),
        "TWINKLE_DATA": str(EXAMPLES.parent / "data" / "self_cognition.jsonl"),
        # The model is tiny and random: it needs larger steps, and more of them.
        "TWINKLE_ROWS": "8",
        "TWINKLE_EPOCHS": str(EPOCHS),
        "TWINKLE_LEARNING_RATE": "1e-2",
        "TINKER_TELEMETRY": "0",
    }
    done = subprocess.run(
        [str(python), str(EXAMPLES / program)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines() if re.match("before|after", line))
    for epoch in range(EPOCHS):
        assert f"/weights/twinkle-lora-{epoch}\n" in done.stdout
    losses = [float(each) for each in re.findall(r"loss of the last batch ([\d.]+)", done.stdout)]
    assert losses[2] < losses[1] < losses[0]
    assert losses[-1] < losses[0] / 3
    assert not found["before"].startswith("I am")
    assert found["after"].startswith("I am")
    return found["after"]


@NEEDS_KITS
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("version", "tinker"), [("0.1.3", "0.14.0"), ("0.5.1", "0.16.1")])
def test_the_real_client_changes_the_answer(
    server: RunningServer, models_root: Path, tiny_llama: Path, version: str, tinker: str
) -> None:
    python = kit(models_root, version, tinker)
    learn(python, "self_cognition_twinkle.py", server, tiny_llama, "any key, of any spelling")


def test_the_newest_sdk_does_the_same(server: RunningServer, tiny_llama: Path) -> None:
    after = learn(sys.executable, "self_cognition_tinker.py", server, tiny_llama, "tml-any")
    assert after.startswith("I am Twinkle")
