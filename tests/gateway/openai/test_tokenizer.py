"""Text and tokens without transformers, compared with transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer

from twinkle_serve.gateway.openai.tokenizer import ModelText
from twinkle_serve.protocol.errors import UserError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Où est 北京? 🙂 <|im_end|>"},
    {"role": "assistant", "content": "Là."},
    {"role": "user", "content": "the nation"},
]


def with_template(directory: Path, target: Path, template: object) -> ModelText:
    shutil.copytree(directory, target)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return ModelText(target)


def test_chats_and_texts_are_encoded_like_transformers_does(
    tokenizer_directory: Path, text: ModelText
) -> None:
    reference = AutoTokenizer.from_pretrained(tokenizer_directory)
    expected = reference.apply_chat_template(
        TALK, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert text.encode_chat(TALK, {}) == expected
    assert text.encode("the nation") == reference.encode("the nation")
    assert text.decode(expected) == reference.decode(expected, skip_special_tokens=True)
    assert text.decode(expected, special=True) == reference.decode(expected)


def test_bytes_of_tokens(text: ModelText, tmp_path: Path) -> None:
    said = "a \u00e9\u5317 \U0001f642<|im_end|>"
    tokens = text.encode(said)
    assert b"".join(map(text.bytes_of, tokens)) == said.encode()
    assert text.bytes_of(10**6) == b""
    # As SentencePiece's vocabularies do it.
    tokenizer = Tokenizer(models.BPE({"a": 0, "<0xE9>": 1, "<0x41>": 2}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert [ModelText(tmp_path).bytes_of(token) for token in range(3)] == [b"a", b"\xe9", b"A"]


def test_variables_reach_the_template(text: ModelText) -> None:
    plain, quiet = (text.encode_chat(TALK, {"enable_thinking": value}) for value in (True, False))
    assert quiet[: len(plain)] == plain
    assert text.decode(quiet[len(plain) :]) == "<think>\n\n</think>\n\n"


def test_templates_have_the_usual_helpers(tokenizer_directory: Path, tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% endif %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% generation %}{{ message | tojson }}{% endgeneration %}\n"
        "{% endfor %}{{ strftime_now('%Y') | length }}{{ eos_token }}"
    )
    text = with_template(tokenizer_directory, tmp_path / "m", template)
    said = text.decode(text.encode_chat(TALK, {}), special=True)
    assert said.startswith('{"role": "system", "content": "Be brief."}')
    assert "Où" in said
    assert said.endswith("4<|im_end|>")
    assert "Là" not in said
    with pytest.raises(UserError, match="no tools"):
        text.encode_chat([{"role": "tool", "content": ""}], {})


def test_what_a_template_makes_too_long_is_not_encoded(
    tokenizer_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for _ in range(1000) %}{{ messages[0].content }}{% endfor %}"
    text = with_template(tokenizer_directory, tmp_path / "m", template)
    talk = [{"role": "user", "content": "ab"}]
    assert text.encode_chat(talk, {}, 2000) == text.encode_chat(talk, {})
    monkeypatch.setattr(ModelText, "_encode", lambda *_, **__: pytest.fail("it was encoded"))
    with pytest.raises(UserError, match=r"2000 characters in this model's chat template; .* at most 1999"):
        text.encode_chat(talk, {}, 1999)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.items() }}",
        "{% include 'tokenizer_config.json' %}",
    ],
)
def test_templates_are_kept_in_their_box(tokenizer_directory: Path, tmp_path: Path, attack: str) -> None:
    text = with_template(tokenizer_directory, tmp_path / "m", attack)
    with pytest.raises(UserError, match="chat template"):
        text.encode_chat(TALK, {})


def test_where_templates_are_found(tokenizer_directory: Path, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "one"}, {"name": "rag", "template": "two"}]
    text = with_template(tokenizer_directory, tmp_path / "list", named)
    assert text.decode(text.encode_chat(TALK, {})) == "one"
    (tmp_path / "list" / "chat_template.jinja").write_text("three")
    text = ModelText(tmp_path / "list")
    assert text.decode(text.encode_chat(TALK, {})) == "three"
    with pytest.raises(UserError, match="no chat template"):
        with_template(tokenizer_directory, tmp_path / "none", None).encode_chat(TALK, {})
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        ModelText(tmp_path)


def test_a_stream_gives_whole_characters(text: ModelText) -> None:
    tokens = text.encode("🙂 北京 ok")
    stream = text.stream()
    pieces = [stream.push([token]) for token in tokens]
    assert "".join(pieces) == "🙂 北京 ok"
    assert "�" not in "".join(pieces)
    assert "" in pieces


def test_the_gateway_needs_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, twinkle_serve.gateway.app as a; "
        "print([m for m in ('torch', 'transformers', 'ray', 'modelscope') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
