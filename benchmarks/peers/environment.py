"""What every peer needs: an environment of its own, the model that all of them read, processes that end.

Knows pip, stamps and logs. Does not know any peer.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

_STAMP = "ready-for-cpu"
# The same shape as testing.models.build_tiny_qwen3_moe, written by the older release of transformers that
# the peers work with.
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


class NotStarted(RuntimeError):
    """With the end of the server's log."""


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment with one release of a peer.

    release: its name for people. size: on disk. fit: what to do to it after installing; raises NotInstallable
    if the release is not the one this was written for.
    """

    release: str
    directory: Path
    packages: tuple[str, ...]
    size: str
    fit: Callable[[Path], None] | None = None

    @property
    def python(self) -> Path:
        return self.directory.resolve() / "bin" / "python"

    def installed(self) -> Path:
        """Its interpreter. Raises NotInstallable with the reason why it is not there."""
        if (self.directory / _STAMP).exists():
            return self.python
        reason = self._why.read_text() if self._why.exists() else ""
        raise NotInstallable(reason or f"not installed: `make peers` does it ({self.size})")

    def install(self) -> Path:
        """Make it if it is not there; returns its interpreter. Raises NotInstallable, and leaves the reason
        for ``installed`` to find."""
        if (self.directory / _STAMP).exists():
            return self.python
        shutil.rmtree(self.directory, ignore_errors=True)
        self._why.unlink(missing_ok=True)
        try:
            self._make()
        except NotInstallable as why:
            self._why.parent.mkdir(parents=True, exist_ok=True)
            self._why.write_text(str(why))
            raise
        (self.directory / _STAMP).touch()
        return self.python

    def main(self) -> None:
        """For the command line: print the interpreter, or end with the reason."""
        try:
            print(self.install())
        except NotInstallable as why:
            sys.exit(str(why))

    @property
    def _why(self) -> Path:
        return self.directory.with_suffix(".why")

    def _make(self) -> None:
        pip = [str(self.python), "-m", "pip", "install", "-q", "--progress-bar", "off", *self.packages]
        try:
            subprocess.run(
                [sys.executable, "-m", "venv", str(self.directory)], check=True, capture_output=True
            )
            subprocess.run(pip, check=True, capture_output=True, text=True)
        except (subprocess.CalledProcessError, OSError) as error:
            last = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1:]
            raise NotInstallable(f"{self.release} cannot be installed here: {' '.join(last)[:200]}") from None
        if self.fit is not None:
            self.fit(self.directory)


def build_model(python: Path, tokenizer_from: Path, directory: Path) -> Path:
    """A tiny Qwen3-MoE that every release of transformers reads, with the tokenizer of another directory."""
    if not (directory / "config.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        for path in tokenizer_from.glob("*token*"):
            shutil.copy(path, directory)
        subprocess.run(
            [str(python), "-W", "ignore", "-c", _BUILD, str(directory)], check=True, capture_output=True
        )
    return directory


def start(
    command: list[str], log: Path, variables: Mapping[str, str], directory: Path | None = None
) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=variables, cwd=directory
        )


def wait_for(words: str, log: Path, process: subprocess.Popen[bytes], *, who: str) -> None:
    """Until ``words`` are in the log. Raises NotStarted if the process ends before, or takes too long."""
    until = time.monotonic() + _START_S
    while words not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > until:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise NotStarted(f"{who} did not start:\n{tail}")
        time.sleep(0.3)
