"""A folder that makes the cookbook's recipes run offline and small: a tokenizer and data under their hub
names.

Both AutoTokenizer and load_dataset prefer a folder of that name in the current directory to the hub. The
rows are made here; only their shape is that of the real data. Knows nothing of recipes or servers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MODEL = "Qwen/Qwen3-30B-A3B-Instruct-2507"
Rows = Sequence[Mapping[str, Any]]
_QUESTIONS = [f"What is {a} and {b} together?" for a in range(2, 10) for b in range(3, 9)]


def make_workspace(directory: Path, model: Path) -> Path:
    """``model``: a small model whose tokenizer stands for that of MODEL."""
    home = directory / MODEL
    home.mkdir(parents=True)
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, home)
    chats = [_chat(question, "It is a sum of two numbers.") for question in _QUESTIONS]
    chats = [{"messages": chat, "prompt": chat[0]["content"], "prompt_id": "x"} for chat in chats]
    _write(directory / "HuggingFaceH4/no_robots", {"default": {"train": chats[:40], "test": chats[40:]}})
    _write(directory / "allenai/tulu-3-sft-mixture", {"default": {"train": chats}})
    sums = [{"question": q, "answer": f"We add them up.\n#### {5 + n}"} for n, q in enumerate(_QUESTIONS)]
    _write(directory / "openai/gsm8k", {"main": {"train": sums[:40], "test": sums[40:]}})
    problems = [{"question": q, "final_answer": str(n), "difficulty": 1.0} for n, q in enumerate(_QUESTIONS)]
    _write(directory / "zwhe99/DeepMath-103K", {"default": {"train": problems}})
    pairs = [_preference(question) for question in _QUESTIONS]
    _write(directory / "Anthropic/hh-rlhf", {"default": {"train": pairs[:40], "test": pairs[40:]}})
    thoughts = [_thought(question) for question in _QUESTIONS]
    _write(directory / "open-thoughts/OpenThoughts3-1.2M", {"default": {"train": thoughts}})
    exam = [_exam(question) for question in _QUESTIONS]
    _write(directory / "hicai-zju/SciKnowEval", {"default": {"test": exam}})
    for name in ("train", "test"):
        (directory / f"rubric_{name}.jsonl").write_text("".join(_rubric(q) for q in _QUESTIONS[:8]))
    (directory / "distilled.jsonl").write_text(
        "".join(json.dumps({"messages": _chat(question, "en")}) + "\n" for question in _QUESTIONS)
    )
    (directory / "sentences.txt").write_text("\n".join(_QUESTIONS[:4]))
    return directory


def _write(directory: Path, configs: Mapping[str, Mapping[str, Rows]]) -> None:
    """A data set as load_dataset finds it: JSON lines, and a card that names configurations and splits."""
    directory.mkdir(parents=True)
    card = ["---", "configs:"]
    for config, splits in configs.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            name = f"{config}-{split}.jsonl"
            (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
            card += [f"  - split: {split}", f"    path: {name}"]
    (directory / "README.md").write_text("\n".join([*card, "---", ""]))


def _chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _preference(question: str) -> dict[str, str]:
    return {
        "chosen": f"\n\nHuman: {question}\n\nAssistant: Gladly: one moment.",
        "rejected": f"\n\nHuman: {question}\n\nAssistant: No.",
    }


def _thought(question: str) -> dict[str, Any]:
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": "<think>so</think> a sum"}]
    return {"conversations": said}


def _exam(question: str) -> dict[str, Any]:
    return {
        "question": question,
        "domain": "Chemistry",
        "details": {"level": "L3"},
        "type": "mcq-4-choices",
        "choices": {"label": ["A", "B"], "text": ["less", "more"]},
        "answerKey": "B",
    }


def _rubric(question: str) -> str:
    rubric = {
        "rubric_str": "Is the answer polite?",
        "extraction_regex": r"<score>(.*)</score>",
        "grader_output_format_instruction": "Put a number into <score></score>.",
    }
    row = {"convo": [{"role": "user", "content": question}], "rubric_items": [rubric]}
    return json.dumps(row) + "\n"
