"""Adapters in the hosted service's layout, through the cookbook's own tools, against merged weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tinker_cookbook import weights
from transformers import AutoModelForCausalLM

from tests.engine.test_peft_format import RANK, layout_of, random_block
from twinkle_serve.engine.merge import merge_adapter
from twinkle_serve.engine.peft_format import export_peft
from twinkle_serve.engine.tinker_format import export_tinker
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.testing.models import build_tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
TOKENS = torch.arange(4, 24)[None]


@pytest.fixture(params=["tiny_moe", "untied llama", "tied llama"])
def base(request: pytest.FixtureRequest, tiny_moe: Path, tmp_path: Path) -> Path:
    if request.param == "tiny_moe":
        return tiny_moe
    return build_tiny_llama(tmp_path, tie_word_embeddings=request.param == "tied llama")


def adapters(base: Path, directory: Path) -> tuple[Path, Path]:
    """The same random adapter as PEFT and as the hosted service has it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    layout, spec = layout_of(model), LoraSpec(RANK)
    block = random_block(layout, spec)
    config, tensors = export_peft(layout, block, spec, str(base))
    for name, content in (("peft", tensors), ("tinker", export_tinker(layout, block, spec))):
        (directory / name).mkdir()
        (directory / name / "adapter_config.json").write_text(json.dumps(config))
        save_file(content, directory / name / "adapter_model.safetensors")
    return directory / "peft", directory / "tinker"


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", ["tiny_moe", "tiny_mixtral", "untied", "tied"])
def test_merged_files_compute_what_peft_computes(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if name.startswith("tiny"):
        base: Path = request.getfixturevalue(name)
    else:
        base = build_tiny_llama(tmp_path, tie_word_embeddings=name == "tied")
    peft, _ = adapters(base, tmp_path)
    changed = merge_adapter(base, peft, tmp_path / "merged")
    expected = logits_of(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), peft)
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    plain = logits_of(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert (expected - plain).abs().max() > 0.05, "an adapter that does nothing would prove nothing"
    assert changed > 5
    assert not list((tmp_path / "merged").glob("*.py"))


def test_an_index_beside_the_single_file_does_not_count(tmp_path: Path) -> None:
    base = build_tiny_llama(tmp_path)
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, base / "old.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "old.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    peft, _ = adapters(base, tmp_path)
    merge_adapter(base, peft, tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").glob("*.safetensors*")] == ["model.safetensors"]
    norm = "model.norm.weight"  # no adapter changes it
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[norm], tensors[norm])


def test_the_cookbook_builds_from_the_hosted_layout(
    base: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    peft, tinker = adapters(base, tmp_path)
    weights.build_lora_adapter(
        base_model=str(base), adapter_path=str(tinker), output_path=str(tmp_path / "lora")
    )
    built = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    ours = load_file(peft / "adapter_model.safetensors")
    for key, tensor in ours.items():
        if "lm_head" not in key:
            assert torch.equal(built[key], tensor), key
    weights.build_hf_model(
        base_model=str(base), adapter_path=str(tinker), output_path=str(tmp_path / "hf"), dtype="float32"
    )
    merge_adapter(base, peft, tmp_path / "merged")
    by_cookbook = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    by_us = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    mine = dict(by_us.named_parameters())
    tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    for name, tensor in by_cookbook.named_parameters():
        if tied and name == "model.embed_tokens.weight":
            continue  # the cookbook adds what is meant for the unembedding to the embedding as well
        torch.testing.assert_close(tensor, mine[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny_moe", "tiny_mixtral"])
def test_fused_experts_are_merged_too(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A base model on disk as transformers has it in memory: gate and up in one tensor of all experts."""
    base: Path = request.getfixturevalue(name)
    peft, _ = adapters(base, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    fused = tmp_path / "fused"
    fused.mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, fused / "model.safetensors")
    (fused / "config.json").write_bytes((base / "config.json").read_bytes())
    merge_adapter(fused, peft, tmp_path / "from fused")
    merge_adapter(base, peft, tmp_path / "from single")
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path / "from single", dtype=torch.float32
    ).state_dict()
    found = load_file(tmp_path / "from fused" / "model.safetensors")
    assert any(key.endswith("experts.gate_up_proj") for key in found)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-6)


def test_an_adapter_with_the_former_names_of_experts_is_merged_too(
    tiny_mixtral: Path, tmp_path: Path
) -> None:
    peft, _ = adapters(tiny_mixtral, tmp_path)
    tensors = load_file(peft / "adapter_model.safetensors")
    shutil.copytree(peft, tmp_path / "former")
    for ours, theirs in (
        ("block_sparse_moe", "mlp"),
        ("w1", "gate_proj"),
        ("w3", "up_proj"),
        ("w2", "down_proj"),
    ):
        tensors = {key.replace(f".{ours}.", f".{theirs}."): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "former" / "adapter_model.safetensors")
    for name in ("peft", "former"):
        merge_adapter(tiny_mixtral, tmp_path / name, tmp_path / f"merged {name}")
    expected, found = (
        (tmp_path / f"merged {name}" / "model.safetensors").read_bytes() for name in ("peft", "former")
    )
    assert found == expected


def test_an_adapter_of_another_model_is_refused_and_leaves_nothing(tiny_moe: Path, tmp_path: Path) -> None:
    peft, _ = adapters(tiny_moe, tmp_path)
    llama = build_tiny_llama(tmp_path / "models", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"adapter's part|has no tensor"):
        merge_adapter(llama, peft, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError):
        merge_adapter(tiny_moe, peft, tmp_path / "there")


def test_no_code_and_no_auto_map_comes_along(tiny_moe: Path, tmp_path: Path) -> None:
    peft, _ = adapters(tiny_moe, tmp_path)
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_moe.iterdir():
        (base / path.name).symlink_to(path)
    config = json.loads((tiny_moe / "config.json").read_text()) | {"auto_map": {"AutoModel": "evil.Model"}}
    (base / "config.json").unlink()
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text("raise SystemExit")
    merge_adapter(base, peft, tmp_path / "merged")
    assert "auto_map" not in (tmp_path / "merged" / "config.json").read_text()
    assert not (tmp_path / "merged" / "evil.py").exists()


def test_a_tied_base_that_also_stores_its_unembedding_is_untied(tmp_path: Path) -> None:
    """Loaders that believe the configuration would leave the merged unembedding out."""
    base = build_tiny_llama(tmp_path, tie_word_embeddings=True)
    peft, _ = adapters(base, tmp_path)
    merge_adapter(base, peft, tmp_path / "expected")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    merge_adapter(base, peft, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "merged"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("sharded", [True, False])
def test_only_the_model_s_own_weights_come_along(tiny_moe: Path, tmp_path: Path, sharded: bool) -> None:
    peft, _ = adapters(tiny_moe, tmp_path)
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    model.save_pretrained(base, max_shard_size="200KB" if sharded else "5GB")
    merge_adapter(base, peft, tmp_path / "expected")
    own = sorted(path.name for path in (tmp_path / "expected").iterdir())
    assert ("model.safetensors.index.json" in own) == sharded
    save_file({"tok_embeddings.weight": torch.ones(2)}, base / "consolidated.safetensors")
    for name in ("params.json", "consolidated.safetensors.index.json", "pytorch_model.bin.index.json"):
        (base / name).write_text("{}")
    merge_adapter(base, peft, tmp_path / "merged")
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == own
    for name in own:
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_a_base_without_its_weight_file_is_refused_by_name(tiny_moe: Path, tmp_path: Path) -> None:
    peft, _ = adapters(tiny_moe, tmp_path)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((tiny_moe / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"base has no model\.safetensors"):
        merge_adapter(base, peft, tmp_path / "merged")
