"""The endpoint over a scripted backend whose one model has a tiny tokenizer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from tests.gateway import scripted
from tests.gateway.scripted import ScriptedBackend
from twinkle_serve.config import Config
from twinkle_serve.gateway.app import create_app
from twinkle_serve.gateway.openai.tokenizer import ModelText
from twinkle_serve.testing.tokenizers import save_tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(directory, 300)
    return directory


@pytest.fixture(scope="session")
def text(tokenizer_directory: Path) -> ModelText:
    return ModelText(tokenizer_directory)


@pytest.fixture
def backend(tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch) -> ScriptedBackend:
    model = replace(
        scripted.MODEL,
        tokenizer_id=str(tokenizer_directory),
        vocab_size=300,
        max_context_length=200,
        eos_token_ids=(299,),
    )
    monkeypatch.setattr(scripted, "MODEL", model)
    return ScriptedBackend()


@pytest.fixture
async def client(backend: ScriptedBackend) -> AsyncIterator[httpx.AsyncClient]:
    config = Config.model_validate({"models": [{"name": "Qwen/Tiny", "path": "/models/tiny"}]})
    transport = httpx.ASGITransport(create_app(lambda: backend, config), raise_app_exceptions=False)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://server/v1", headers={"Authorization": "Bearer tml-x"}
    ) as client:
        yield client
