"""Checkpoint directories of runs: PEFT reads them, and a run that is loaded goes on as if uninterrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyrage
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.engine import reference
from tests.engine.conftest import EngineFactory
from tests.engine.ticks import (
    create,
    forward_backward,
    optim_step,
    random_batch,
    run,
    tensors,
    value,
)
from twinkle_serve.engine import adapter_files
from twinkle_serve.engine.adapter_files import encrypted, load_adapter, save_adapter
from twinkle_serve.engine.engine import Engine
from twinkle_serve.engine.merge import merge_adapter
from twinkle_serve.engine.slots import AdapterState
from twinkle_serve.protocol.data import AdamParams, LoraSpec
from twinkle_serve.protocol.work import LoadAdapter, Outcome, SaveAdapter
from twinkle_serve.storage.checkpoints import CheckpointDamagedError, CheckpointMissingError

pytestmark = [  # what PEFT and transformers tell each other
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

# eps and weight decay large enough to matter, a clip that bites on some steps.
STEPS = [
    AdamParams(learning_rate=3e-3, beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=0.1, grad_clip_norm=norm)
    for norm in (0.0, 1.0, 0.0, 1e6)
]


def save(engine: Engine, slot: int, directory: Path, *, optimizer: bool = True) -> int:
    item = SaveAdapter("save", slot, str(directory), optimizer, {"kind": "training"})
    size: int = value(run(engine, saves=(item,))["save"])
    return size


def load(engine: Engine, slot: int, directory: Path, *, optimizer: bool) -> Outcome:
    item = LoadAdapter("load", "run", slot, str(directory), optimizer)
    return run(engine, loads=(item,))["load"]


def train(engine: Engine, slot: int, steps: int, seed: int) -> list[float]:
    rng = np.random.default_rng(seed)
    losses = []
    for step in range(steps):
        result = forward_backward(engine, slot, random_batch(rng, [6, 4]))
        losses.append(result.metrics["loss:sum"])
        optim_step(engine, slot, STEPS[step % 4])
    return losses


def peft_model(directory: Path, adapter: Path, *, trainable: bool = False) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter, is_trainable=trainable).eval()


@pytest.fixture(params=["tiny_moe", "tiny_mixtral", "tiny_qwen3", "tiny_llama"])
def family(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.getfixturevalue(request.param)
    return directory


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"train_unembed": False},
        {"train_attn": False},
        {"train_attn": False, "train_unembed": False},
    ],
)
def test_peft_reproduces_our_logprobs(
    flags: dict[str, bool], family: Path, engine_for: EngineFactory, tmp_path: Path
) -> None:
    engine = engine_for(family)
    create(engine, 0, LoraSpec(rank=6, seed=1, **flags), moved=True)
    train(engine, 0, 2, seed=1)
    save(engine, 0, tmp_path / "adapter")
    batch = random_batch(np.random.default_rng(2), [9, 4])
    ours = forward_backward(engine, 0, batch, backward=False).logprobs.values
    model = peft_model(family, tmp_path / "adapter")
    with torch.no_grad():
        theirs = reference.target_logprobs(lambda tokens: model(tokens[None]).logits[0], batch)
        untouched = reference.target_logprobs(reference.plain(reference.load_model(family)), batch)
    np.testing.assert_allclose(ours, torch.cat(theirs), atol=1e-4, rtol=0)
    assert float(np.abs(ours - torch.cat(untouched).numpy()).max()) > 0.01


@pytest.mark.parametrize("flags", [{}, {"train_attn": False, "train_unembed": False}], ids=["all", "mlp"])
def test_adapters_of_every_mixture_are_the_same_in_peft_here_again_and_merged(
    flags: dict[str, bool], mixture: Path, engine_for: EngineFactory, tmp_path: Path
) -> None:
    engine = engine_for(mixture)
    create(engine, 0, LoraSpec(rank=6, seed=1, **flags), moved=True)
    train(engine, 0, 2, seed=1)
    save(engine, 0, tmp_path / "adapter")
    batch = random_batch(np.random.default_rng(2), [9, 4])
    ours = forward_backward(engine, 0, batch, backward=False).logprobs.values
    merge_adapter(mixture, tmp_path / "adapter", tmp_path / "merged")
    theirs = {
        "peft": logprobs_of(peft_model(mixture, tmp_path / "adapter"), batch),
        "merged": logprobs_of(reference.load_model(tmp_path / "merged"), batch),
    }
    for found in theirs.values():
        np.testing.assert_allclose(ours, found, atol=1e-4, rtol=0)
    untouched = logprobs_of(reference.load_model(mixture), batch)
    assert float(np.abs(ours - untouched).max()) > 0.01

    create(engine, 1, LoraSpec(rank=6, seed=2, **flags))
    value(load(engine, 1, tmp_path / "adapter", optimizer=True))
    for mine, again in zip(engine.pool.blocks(0), engine.pool.blocks(1), strict=True):
        assert torch.equal(mine, again)


def logprobs_of(model: torch.nn.Module, batch: Any) -> np.ndarray:
    with torch.no_grad():
        found = reference.target_logprobs(lambda tokens: model(tokens[None]).logits[0], batch)
    return np.asarray(torch.cat(found))


@pytest.mark.parametrize("model", ["tiny_qwen3", "tiny_llama"])
def test_four_steps_equal_torch_adamw_on_the_exported_adapter(
    model: str, request: pytest.FixtureRequest, engine_for: EngineFactory, tmp_path: Path
) -> None:
    directory: Path = request.getfixturevalue(model)
    engine = engine_for(directory)
    create(engine, 0, LoraSpec(rank=4, seed=1), moved=True)
    save(engine, 0, tmp_path / "start")
    theirs = peft_model(directory, tmp_path / "start", trainable=True)
    factors = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    parameters = list(factors.values())
    optimizer = torch.optim.AdamW(parameters)
    rng = np.random.default_rng(5)
    for params in STEPS:
        batch = random_batch(rng, [7, 5])
        forward_backward(engine, 0, batch)
        metrics = optim_step(engine, 0, params)
        logprobs = reference.target_logprobs(lambda tokens: theirs(tokens[None]).logits[0], batch)
        optimizer.zero_grad()
        reference.loss("cross_entropy", logprobs, batch, {}).backward()
        norm = reference_step(optimizer, parameters, params)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    save(engine, 0, tmp_path / "end")
    assert_close_adapters(
        load_file(tmp_path / "end" / "adapter_model.safetensors"),
        {name.replace(".default.", "."): p.detach() for name, p in factors.items()},
        load_file(tmp_path / "start" / "adapter_model.safetensors"),
    )


def test_four_steps_equal_torch_adamw_on_tied_expert_factors(
    moe: Engine, tiny_moe: Path, tmp_path: Path
) -> None:
    create(moe, 0, LoraSpec(rank=4, seed=1), moved=True)
    start = tensors(moe, 0)
    dense = reference.DenseAdapter(reference.load_model(tiny_moe), start)
    parameters = list(dense.factors.values())
    optimizer = torch.optim.AdamW(parameters)
    rng = np.random.default_rng(6)
    for params in STEPS:
        batch = random_batch(rng, [7, 5])
        forward_backward(moe, 0, batch)
        metrics = optim_step(moe, 0, params)
        optimizer.zero_grad()
        logprobs = reference.target_logprobs(dense.logits, batch)
        reference.loss("cross_entropy", logprobs, batch, {}).backward()
        norm = reference_step(optimizer, parameters, params)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    expected = {key: factor.detach() for key, factor in dense.spread(dense.factors).items()}
    assert_close_adapters(tensors(moe, 0), expected, start)


def reference_step(optimizer: torch.optim.AdamW, parameters: list[torch.Tensor], params: AdamParams) -> float:
    for group in optimizer.param_groups:
        group.update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
    limit = params.grad_clip_norm or float("inf")
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    optimizer.step()
    return norm


def assert_close_adapters(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> None:
    """Within 1e-3 of how far each tensor moved."""
    assert found.keys() == expected.keys() == start.keys()
    for key, tensor in expected.items():
        moved = float((tensor - start[key]).norm())
        assert moved > 1e-3, key
        assert float((found[key] - tensor).norm()) <= 1e-3 * moved, key


# Resuming -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", ["the living run", "a new run"])
def test_resuming_with_the_optimizer_is_as_if_uninterrupted(into: str, moe: Engine, tmp_path: Path) -> None:
    create(moe, 0, LoraSpec(rank=4, seed=1))
    train(moe, 0, 3, seed=1)
    save(moe, 0, tmp_path / "c")
    losses = train(moe, 0, 3, seed=2)
    expected = [block.clone() for block in moe.pool.blocks(0)]

    forward_backward(moe, 0, random_batch(np.random.default_rng(9), [5]))  # gradients that must not stay
    slot = 0 if into == "the living run" else 3
    assert load(moe, slot, tmp_path / "c", optimizer=True) == Outcome("load")
    assert (moe.pool.has_grads[slot], moe.pool.steps[slot]) == (False, 3)
    assert train(moe, slot, 3, seed=2) == losses
    assert all(torch.equal(a, b) for a, b in zip(moe.pool.blocks(slot), expected, strict=True))

    assert load(moe, slot, tmp_path / "c", optimizer=False) == Outcome("load")
    assert not any(block.any() for block in moe.pool.blocks(slot)[1:])
    without = train(moe, slot, 3, seed=2)
    assert without[0] == losses[0]
    assert without != losses
    assert not torch.equal(moe.pool.blocks(slot)[0], expected[0])


def test_without_the_optimizer_a_checkpoint_has_no_moments(moe: Engine, tmp_path: Path) -> None:
    create(moe, 0, LoraSpec(rank=4, seed=1))
    train(moe, 0, 1, seed=1)
    small = save(moe, 0, tmp_path / "weights", optimizer=False)
    assert not (tmp_path / "weights" / "optimizer.safetensors").exists()
    assert save(moe, 0, tmp_path / "all") > 2 * small
    value(load(moe, 1, tmp_path / "weights", optimizer=True))
    assert moe.pool.steps[1] == 0
    assert not moe.pool.blocks(1)[2].any()


def test_a_checkpoint_before_the_first_step(moe: Engine, tmp_path: Path) -> None:
    create(moe, 0, LoraSpec(rank=4, seed=1))
    save(moe, 0, tmp_path / "c")
    value(load(moe, 1, tmp_path / "c", optimizer=True))
    assert torch.equal(moe.pool.blocks(0)[0], moe.pool.blocks(1)[0])
    assert moe.pool.steps[1] == 0


def test_the_directory_s_files_manifest_and_size(moe: Engine, tmp_path: Path) -> None:
    create(moe, 0, LoraSpec(rank=4, seed=1))
    train(moe, 0, 2, seed=1)
    size = save(moe, 0, tmp_path / "c")
    files = {path.name for path in (tmp_path / "c").iterdir()}
    assert files == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "manifest.json",
    }
    assert size == sum(path.stat().st_size for path in (tmp_path / "c").iterdir())
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert (manifest["kind"], manifest["step"]) == ("training", 2)
    assert set(manifest["files"]) == files - {"manifest.json"}


def test_files_are_encrypted_to_each_recipient() -> None:
    native, ssh = pyrage.x25519.Identity.generate(), Ed25519PrivateKey.generate()
    encoding, public = serialization.Encoding, serialization.PublicFormat.OpenSSH
    recipients = [str(native.to_public()), ssh.public_key().public_bytes(encoding.OpenSSH, public).decode()]
    files = {"a": b"weights", "b": b""}
    written = encrypted(files, recipients)
    private = serialization.PrivateFormat.OpenSSH
    text = ssh.private_bytes(encoding.PEM, private, serialization.NoEncryption())
    for identity in (native, pyrage.ssh.Identity.from_buffer(text)):
        assert {name: pyrage.decrypt(data, [identity]) for name, data in written.items()} == {
            "a.age": b"weights",
            "b.age": b"",
        }


# What cannot be loaded ------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(moe: Engine, tmp_path: Path) -> Path:
    """A checkpoint of rank 4; slot 0 holds a rank-4 run with other weights."""
    create(moe, 0, LoraSpec(rank=4, seed=1), moved=True)
    train(moe, 0, 1, seed=1)
    save(moe, 0, tmp_path / "c")
    moe.pool.free(0)
    create(moe, 0, LoraSpec(rank=4, seed=2), moved=True)
    forward_backward(moe, 0, random_batch(np.random.default_rng(0), [4]))
    return tmp_path / "c"


def assert_refused(engine: Engine, slot: int, directory: Path, words: str) -> None:
    before = [block.clone() for block in engine.pool.blocks(0)]
    failure = load(engine, slot, directory, optimizer=True).failure
    assert failure is not None
    assert failure.category == "user"
    assert words in failure.message
    assert str(directory) not in failure.message
    assert all(torch.equal(a, b) for a, b in zip(engine.pool.blocks(0), before, strict=True))


def test_a_run_of_another_shape_refuses_and_stays(checkpoint: Path, moe: Engine, tmp_path: Path) -> None:
    create(moe, 1, LoraSpec(rank=8))
    assert_refused(moe, 1, checkpoint, "rank 8")
    create(moe, 2, LoraSpec(rank=4, train_unembed=False))
    assert_refused(moe, 2, checkpoint, "attn+mlp")


def test_a_missing_checkpoint(checkpoint: Path, moe: Engine, tmp_path: Path) -> None:
    assert_refused(moe, 0, tmp_path / "nowhere", "missing or damaged")
    with pytest.raises(CheckpointMissingError):
        load_adapter(str(tmp_path / "nowhere"), moe.base.layout, False)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.safetensors", "adapter_config.json"]
)
def test_a_changed_byte(name: str, checkpoint: Path, moe: Engine) -> None:
    path = checkpoint / name
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    assert_refused(moe, 0, checkpoint, "missing or damaged")
    with pytest.raises(CheckpointDamagedError):
        load_adapter(str(checkpoint), moe.base.layout, False)


def test_a_checkpoint_of_another_model(
    checkpoint: Path, moe: Engine, engine_for: EngineFactory, tiny_llama: Path
) -> None:
    llama = engine_for(tiny_llama)
    create(llama, 0, LoraSpec(rank=4))
    assert_refused(llama, 0, checkpoint, "no LoRA target")


def test_moments_of_another_shape(moe: Engine, tmp_path: Path) -> None:
    create(moe, 0, LoraSpec(rank=4))
    state = moe.pool.state(0)
    state.exp_avg = torch.zeros(3, moe.base.layout.row_size)
    state.exp_avg_sq = state.exp_avg.clone()
    manifest: dict[str, Any] = {}
    save_adapter(str(tmp_path / "c"), state, moe.base.layout, "m", manifest)
    assert_refused(moe, 0, tmp_path / "c", "exp_avg does not have the shape")


def test_a_save_that_fails_is_a_server_error(moe: Engine, tmp_path: Path) -> None:
    create(moe, 0, LoraSpec(rank=4))
    (tmp_path / "file").touch()
    item = SaveAdapter("save", 0, str(tmp_path / "file" / "c"), True, {})
    failure = run(moe, saves=(item,))["save"].failure
    assert failure is not None
    assert failure.category == "server"
    assert str(tmp_path) not in failure.message


def test_a_checkpoint_that_is_overwritten_while_it_is_loaded_comes_from_one_save(
    moe: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, spec, directory = moe.base.layout, LoraSpec(4), str(tmp_path / "x")

    def written(value: float) -> None:
        block = torch.full((spec.rank, layout.row_size), value)
        state = AdapterState(spec, block, exp_avg=block.clone(), exp_avg_sq=block.clone(), step=int(value))
        save_adapter(directory, state, layout, "base", {})

    written(1.0)
    reads: list[Path] = []

    def load_file_and_overwrite(path: Path) -> Any:
        reads.append(path)
        found = load_file(path)
        if len(reads) == 1:
            written(2.0)
        return found

    monkeypatch.setattr(adapter_files, "load_file", load_file_and_overwrite)
    state = load_adapter(directory, layout, optimizer=True)
    assert state.exp_avg is not None
    assert (state.weights.max(), state.exp_avg.max(), state.step) == (2.0, 2.0, 2)


def test_an_encrypted_export_is_refused_as_one(moe: Engine, tmp_path: Path) -> None:
    layout, spec = moe.base.layout, LoraSpec(4)
    recipient = str(pyrage.x25519.Identity.generate().to_public())
    state = AdapterState(spec, torch.zeros(spec.rank, layout.row_size))
    manifest = {"layout": "tinker", "age_recipients": [recipient]}
    save_adapter(str(tmp_path / "x"), state, layout, "base", manifest)
    create(moe, 0, spec)
    assert_refused(moe, 0, tmp_path / "x", "encrypted")
