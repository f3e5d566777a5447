"""An adapter added into its base model: a Hugging Face directory that needs no LoRA to be served.

Works tensor by tensor on files, without loading the model: one tensor is in memory at a time. Knows PEFT's
keys and base models' tensors, experts one by one or fused, by the names of the model's family. Does not know
checkpoints' owners or where they are kept.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from twinkle_serve.engine.adapter_files import CONFIG, WEIGHTS
from twinkle_serve.engine.peft_fused import of_expert
from twinkle_serve.engine.sharding.families import Family, Part, family_of
from twinkle_serve.model_files import INDEX, weight_files

_PREFIX = "base_model.model."
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj")
_FUSED = re.compile(r"(.*\.experts)(\.base_layer)?")
# Configuration, tokenizer and chat template; never code.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md")
# About weights that do not come along: indices, and the configuration of Mistral's own consolidated file.
_LEFT = ("*.index.json", "params.json")


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a tensor of the result comes from. name: in the file; result: in the merged model."""

    name: str
    result: str
    file: Path


class _Factors(NamedTuple):
    """Where an adapter has a module's A and B: under ``name``, or there as a part of one of the experts."""

    name: str
    part: Part | None = None
    expert: int = 0


def merge_adapter(base: str | Path, adapter: str | Path, output: str | Path) -> int:
    """Write the merged model to the new directory ``output``. Returns how many tensors the adapter changed.

    Raises ValueError if the adapter is not one of this base model, DamagedModel, FileExistsError.
    """
    base, adapter, output = Path(base), Path(adapter), Path(output)
    output.mkdir(parents=True)
    try:
        model_type = json.loads((base / "config.json").read_bytes()).get("model_type")
        delta = _Delta(adapter, family_of(model_type))
        sources = list(_sources(base, delta))
        index: dict[str, str] = {}
        for name in sorted({source.file.name for source in sources}):
            part = [source for source in sources if source.file.name == name]
            _write(output / name, part, delta)
            index |= {source.result: name for source in part}
        unused = delta.unused
        if unused:
            raise ValueError(f"the base model has no tensor for {unused[0]} and {len(unused) - 1} more")
        _copy_rest(base, output, index, untied=delta.touches(_HEAD))
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    return delta.num_changed


def _sources(base: Path, delta: _Delta) -> Iterator[_Source]:
    """Every tensor of the result; a tied unembedding that the adapter changes gets a tensor of its own."""
    names: dict[str, Path] = {}
    # Others may lie beside them, with the same weights once more.
    for file in (base / name for name in weight_files(base)):
        if not file.is_file():
            raise ValueError(f"{base.name} has no {file.name}")
        with safe_open(file, "pt") as tensors:
            names |= dict.fromkeys(tensors.keys(), file)
    for name, file in names.items():
        yield _Source(name, name, file)
    if delta.touches(_HEAD) and _HEAD not in names:
        yield _Source(_EMBEDDING, _HEAD, names[_EMBEDDING])


class _Delta:
    """What an adapter adds to each tensor. family: of the base model."""

    def __init__(self, directory: Path, family: Family) -> None:
        config = json.loads((directory / CONFIG).read_bytes())
        self._scale = config["lora_alpha"] / config["r"]
        self._file = safe_open(directory / WEIGHTS, "pt")
        self._family = family
        keys = list(self._file.keys())
        names = [key.removesuffix(".lora_A.weight") for key in keys if ".lora_A." in key]
        self._rank: int = config["r"]
        # By what the base model's files call the module.
        self._modules: dict[str, _Factors] = {}
        for name in names:
            self._modules |= self._named(name)
        self._used: set[str] = set()
        self._read_name = ""
        self._read_pair: tuple[torch.Tensor, torch.Tensor] = (torch.empty(0), torch.empty(0))
        self.num_changed = 0

    @property
    def unused(self) -> list[str]:
        return [factors.name for module, factors in self._modules.items() if module not in self._used]

    def touches(self, name: str) -> bool:
        return name.removesuffix(".weight") in self._modules

    def add_to(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` with what the adapter has for it, computed in float32, in its own type."""
        if name.endswith(".experts.gate_up_proj"):
            parts = self._experts(name.removesuffix(".gate_up_proj"), ("gate", "up"), weight)
        elif name.endswith(".experts.down_proj"):
            parts = self._experts(name.removesuffix(".down_proj"), ("down",), weight)
        else:
            parts = self._product(name.removesuffix(".weight")) if self.touches(name) else None
        if parts is None:
            return weight
        if parts.shape != weight.shape:
            raise ValueError(
                f"{name} is {list(weight.shape)}, but the adapter's part for it {list(parts.shape)}"
            )
        self.num_changed += 1
        return (weight.float() + parts).to(weight.dtype)

    def _named(self, name: str) -> dict[str, _Factors]:
        """What the adapter's module ``name`` is for: one module, or one of each expert of a layer."""
        module = name.removeprefix(_PREFIX)
        fused = _FUSED.fullmatch(module)
        if fused is None:
            return {self._in_files(module): _Factors(name)}
        block, is_inner = fused.groups()
        parts: tuple[Part, ...] = ("gate", "up") if is_inner else ("down",)
        rows = self._file.get_slice(f"{name}.lora_A.weight").get_shape()[0]
        return {
            self._family.expert(block, expert, part): _Factors(name, part, expert)
            for expert in range(rows // (len(parts) * self._rank))
            for part in parts
        }

    def _in_files(self, module: str) -> str:
        """Adapters call experts as the files do or, as all adapters were once written, as Qwen's are."""
        match = _EXPERT.fullmatch(module)
        if match is None:
            return module
        block, expert, part = match.groups()
        return self._family.expert(block, int(expert), part)  # type: ignore[arg-type]

    def _experts(self, block: str, parts: tuple[Part, ...], weight: torch.Tensor) -> torch.Tensor | None:
        """For a fused tensor ``[experts, out, in]``: the parts one below the other."""
        modules = [[self._family.expert(block, e, part) for part in parts] for e in range(weight.shape[0])]
        if modules[0][0] not in self._modules:
            return None
        return torch.stack([torch.cat([self._product(module) for module in row]) for row in modules])

    def _product(self, module: str) -> torch.Tensor:
        self._used.add(module)
        name, part, expert = self._modules[module]
        if self._read_name != name:  # experts that lie in one tensor are asked for one after the other
            pair = [self._file.get_tensor(f"{name}.lora_{factor}.weight").float() for factor in "AB"]
            self._read_name, self._read_pair = name, (pair[0], pair[1])
        a, b = self._read_pair
        if part is not None:
            a, b = of_expert(a, b, part, expert, self._rank)
        product: torch.Tensor = self._scale * (b @ a)
        return product


def _write(path: Path, part: list[_Source], delta: _Delta) -> None:
    """A safetensors file, written as its tensors are made: shapes and types are those of the base model."""
    with safe_open(part[0].file, "pt") as base, path.open("wb") as file:
        header, end = {}, 0
        described = _header_of(part[0].file)
        for source in part:
            entry = described[source.name]
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            header[source.result] = entry | {"data_offsets": [end, end + size]}
            end += size
        text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)
        for source in part:
            merged = delta.add_to(source.result, base.get_tensor(source.name)).contiguous()
            file.write(merged.reshape(-1).view(torch.uint8).numpy().tobytes())


def _header_of(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
    return header


def _copy_rest(base: Path, output: Path, index: Mapping[str, str], untied: bool) -> None:
    for pattern in _COPIED:
        for path in base.glob(pattern):
            if path.is_file() and not any(path.match(left) for left in _LEFT):
                shutil.copyfile(path, output / path.name)
    config = json.loads((base / "config.json").read_bytes())
    config.pop("auto_map", None)
    if untied:
        config["tie_word_embeddings"] = False
    (output / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if len(set(index.values())) > 1:
        size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        document = {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}
        (output / INDEX).write_text(json.dumps(document, indent=1) + "\n")
