"""Fixtures shared by all tests: tiny models, each built once a machine, and free ports.

Importing this imports no torch; a model's builder does, when a test asks for the model.
"""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two spinning threads cost more than they give
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")

# How long an example takes says more about the machine's other work than about the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def models_root() -> Path:
    """Where built models are kept between runs; TWINKLE_MODELS moves it."""
    return Path(os.environ.get("TWINKLE_MODELS", REPOSITORY / "models"))


@pytest.fixture(scope="session")
def tiny_moe(models_root: Path) -> Path:
    """Random Qwen3-MoE: 350 words, 2 layers of 64, 4 experts of which 2 answer."""
    from twinkle_serve.testing.models import build_tiny_qwen3_moe

    return build_tiny_qwen3_moe(models_root)


@pytest.fixture(scope="session")
def tiny_moe_qwen_vocab(models_root: Path) -> Path:
    """The same with Qwen3's real tokenizer and 151,936 words."""
    from twinkle_serve.testing.models import QWEN3_VOCAB_SIZE, build_tiny_qwen3_moe

    return build_tiny_qwen3_moe(models_root, vocab_size=QWEN3_VOCAB_SIZE)


@pytest.fixture(scope="session")
def tiny_qwen3(models_root: Path) -> Path:
    """Random dense Qwen3: 350 words, 2 layers of 64."""
    from twinkle_serve.testing.models import build_tiny_qwen3

    return build_tiny_qwen3(models_root)


@pytest.fixture(scope="session")
def tiny_llama(models_root: Path) -> Path:
    """Random Llama with a tied unembedding: 350 words, 2 layers of 64."""
    from twinkle_serve.testing.models import build_tiny_llama

    return build_tiny_llama(models_root, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def smollm2(models_root: Path) -> Path:
    """SmolLM2-135M-Instruct; slow to build the first time (a 93 MB download)."""
    from twinkle_serve.testing.models import build_smollm2

    return build_smollm2(models_root)


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Call it for a loopback port that nobody listens on."""
    from twinkle_serve.testing.server import free_port

    return free_port


@pytest.fixture
def loggers_as_before() -> Iterator[None]:
    """For tests that set up the service's loggers."""
    root = logging.getLogger("twinkle_serve")
    level, handlers = root.level, list(root.handlers)
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


@pytest.fixture
def no_stray_sockets() -> Iterator[None]:
    """For tests with the SDK's client in this process: it leaves sockets to the garbage collector, whose
    warnings would otherwise hit whichever test runs then."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
