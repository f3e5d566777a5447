"""Each rank reads what it keeps; what is not the model of config.json is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.engine.sharding import remote
from tests.engine.sharding.compare import passes
from tests.engine.sharding.conftest import BothFactory, sharded
from tests.engine.sharding.test_training import SPECS, work
from twinkle_serve.engine.sharding.families import DENSE, MIXTURES, Family
from twinkle_serve.engine.sharding.files import WeightFiles
from twinkle_serve.engine.sharding.loading import fill, is_fused_experts, keep_experts, skeleton
from twinkle_serve.engine.unsupported import UnsupportedModel
from twinkle_serve.testing.crew import Crew, CrewError
from twinkle_serve.testing.models import build_tiny_qwen3_moe


def place(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))


def build(directory: Path, family: Family, experts: range | None = None) -> torch.nn.Module:
    model = skeleton(AutoConfig.from_pretrained(directory), torch.float32)
    if experts is not None:
        assert keep_experts(model, experts) > 0
    fill(model, WeightFiles(directory), family, place, experts.start if experts is not None else 0)
    return model


@pytest.mark.parametrize("name", ["tiny_qwen3", "tiny_llama", "tiny_moe", "tiny_mixtral"])
def test_every_weight_and_buffer_is_what_transformers_loads(
    name: str, request: pytest.FixtureRequest
) -> None:
    directory: Path = request.getfixturevalue(name)
    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = build(directory, MIXTURES.get(expected.config.model_type, DENSE))
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in expected.named_parameters()}
    for key, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(key), parameter), key
    for key, buffer in expected.named_buffers():
        assert torch.equal(model.get_buffer(key), buffer), key
    with torch.no_grad():
        tokens = torch.arange(7)[None]
        assert torch.equal(model(tokens).logits, expected.eval()(tokens).logits)


def test_only_the_wanted_experts_are_read(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = WeightFiles.read
    monkeypatch.setattr(
        WeightFiles, "read", lambda files, name, *a: read.append(name) or original(files, name, *a)
    )
    model = build(tiny_moe, MIXTURES["qwen3_moe"], range(2, 4))
    expected = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    for (key, module), other in zip(model.named_modules(), expected.modules(), strict=True):
        if is_fused_experts(module):
            assert torch.equal(module.gate_up_proj, other.gate_up_proj[2:4]), key
            assert torch.equal(module.down_proj, other.down_proj[2:4]), key
    assert {name.split(".experts.")[1].split(".")[0] for name in read if ".experts." in name} == {"2", "3"}


def test_experts_that_were_written_fused_are_sliced(tiny_moe: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_moe, tmp_path / "m")
    expected = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    tensors = {key: value.contiguous() for key, value in expected.state_dict().items()}
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    model = build(tmp_path / "m", MIXTURES["qwen3_moe"], range(1, 3))
    for module, other in zip(model.modules(), expected.modules(), strict=True):
        if is_fused_experts(module):
            assert torch.equal(module.gate_up_proj, other.gate_up_proj[1:3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c, t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"),
            r"lack model\.layers\.1.*experts\.3\.up_proj",
        ),
        (lambda c, t: c.update(moe_intermediate_size=48), r"experts\.0\.gate_proj.*config.json asks for"),
        (lambda c, t: c.update(num_hidden_layers=3), r"lack model\.layers\.2"),
    ],
)
def test_weights_of_another_architecture_are_refused(
    tiny_moe: Path, tmp_path: Path, change: Callable[[Any, Any], Any], message: str
) -> None:
    directory = tmp_path / "m"
    shutil.copytree(tiny_moe, directory)
    config, tensors = (
        json.loads((directory / "config.json").read_text()),
        load_file(directory / "model.safetensors"),
    )
    change(config, tensors)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=message):
        build(directory, MIXTURES["qwen3_moe"])


def test_an_unlisted_architecture_is_refused_with_the_list(two: Crew, tiny_qwen3: Path) -> None:
    config = sharded(tiny_qwen3, 2, "expert_parallel")
    with pytest.raises(CrewError, match="qwen3; sharding: expert_parallel serves qwen3_moe and mixtral, and"):
        two.run(remote.start_afresh, config)


def test_experts_that_ranks_cannot_share_evenly_are_refused(two: Crew, models_root: Path) -> None:
    odd = build_tiny_qwen3_moe(models_root, num_experts=3)
    with pytest.raises(CrewError, match=r"\[3\] experts a layer; 2 ranks cannot share them evenly"):
        two.run(remote.start_afresh, sharded(odd, 2, "expert_parallel"))


@pytest.mark.parametrize("sharding", ["expert_parallel", "zero3"])
def test_mixtral_trains_on_two_ranks(both: BothFactory, tiny_mixtral: Path, sharding: str) -> None:
    pair = both(sharding, tiny_mixtral)
    pair.create(SPECS)
    pair.run(**passes(work(1, [[9, 2, 31, 4], [17], [3, 3, 8]])))
    pair.assert_same_slots(range(3))
