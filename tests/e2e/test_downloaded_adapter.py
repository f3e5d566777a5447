"""What the `tinker` command downloads is a PEFT adapter that computes what the server computed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from twinkle_serve.testing.server import RunningServer

pytestmark = [
    pytest.mark.slow,
    # PEFT's own: a call that transformers renames, patterns for a fused layout, and a tied unembedding that
    # is adapted while the embedding is not, as Tinker does it.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

PROMPT = list(range(5, 21))  # of sdk_program.py


def tinker(*arguments: str, url: str) -> str:
    """Run the SDK's own command line as the user of sdk_program.py."""
    environment = {"TINKER_BASE_URL": url, "TINKER_API_KEY": "tml-e2e", "TINKER_TELEMETRY": "0"}
    command = [str(Path(sys.executable).parent / "tinker"), *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("name", "fixture"), [("moe", "tiny_moe"), ("llama", "tiny_llama")])
def test_a_downloaded_adapter_gives_the_same_logprobs_in_peft(
    name: str,
    fixture: str,
    server: RunningServer,
    sdk_program_seen: Callable[..., dict[str, Any]],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    seen = sdk_program_seen(server.url, name)
    (state,) = (path for path in seen["paths"] if "/weights/" in path)
    tinker("checkpoint", "download", state, "--output", str(tmp_path), url=server.url)
    (adapter,) = tmp_path.iterdir()

    base = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(fixture), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter)
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        logprobs = model(tokens).logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
    assert logprobs.tolist() == pytest.approx(seen["logprobs"], abs=1e-4)
    assert -sum(seen["logprobs"]) < 0.9 * seen["base_loss"], "an untrained adapter would prove nothing"
