"""Text and tokens of one base model, from the files in its directory.

Knows tokenizer.json, Hugging Face's chat templates and what they may call. Needs neither torch nor
transformers. Does not know requests or what is sampled.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from twinkle_serve.protocol.errors import UserError

# Beside the tokens that the tokenizer knows, a template may use their names.
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # how vocabularies with a fallback to bytes write one


class ModelText:
    """A model's tokenizer and chat template. Raises UserError if ``directory`` has no tokenizer.

    longest_token: its characters; no text has more of them than that for each of its tokens.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                "this model's directory has no tokenizer.json, so text cannot be turned into tokens here; "
                "the tinker SDK, which sends tokens, can use the model"
            )
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        self.longest_token = max(map(len, self._tokenizer.get_vocab()), default=1)
        decoder = self._tokenizer.decoder
        self._decoders = set() if decoder is None else _types_in(json.loads(decoder.__getstate__()))
        self._added = set(self._tokenizer.get_added_tokens_decoder())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = _read_json(directory / "tokenizer_config.json")
        source = _template(directory, settings)
        self._template = None if source is None else _environment().from_string(source)
        self._names = {name: _content(settings.get(name)) for name in _NAMED_TOKENS if settings.get(name)}

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text, with what the tokenizer puts before every text (a BOS, maybe)."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        variables: Mapping[str, Any],
        max_characters: float = math.inf,
    ) -> list[int]:
        """Tokens of a conversation up to where the model answers. max_characters: in the template's form,
        which may have more of them than it was given. Raises UserError."""
        if self._template is None:
            raise UserError("this model has no chat template; use /v1/completions")
        try:
            text = self._template.render(
                **(self._names | dict(variables)), messages=list(messages), add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"this model's chat template refuses these messages: {error}") from None
        if len(text) > max_characters:
            raise UserError(
                f"messages have {len(text)} characters in this model's chat template; its context holds at "
                f"most {max_characters}"
            )
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # A batch of one: unlike a single text, it is encoded without the interpreter's lock.
        (found,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return list(found.ids)

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=not special))

    def bytes_of(self, token: int) -> bytes:
        """What one token stands for, which may be a part of a character."""
        piece = self._tokenizer.id_to_token(token) or ""
        if "ByteFallback" in self._decoders and _BYTE.fullmatch(piece):
            return bytes.fromhex(piece[3:5])
        if "ByteLevel" in self._decoders and token not in self._added and _BYTE_OF.keys() >= set(piece):
            return bytes(_BYTE_OF[character] for character in piece)
        return self.decode([token], special=True).encode()

    def stream(self) -> TextStream:
        return TextStream(self._tokenizer)


def _types_in(decoder: Mapping[str, Any]) -> set[str]:
    """Of a decoder of tokenizer.json and those that it is made of."""
    return {decoder["type"]}.union(*map(_types_in, decoder.get("decoders", ())))


def _byte_level() -> dict[str, int]:
    """How byte-level vocabularies write bytes: those that print as themselves, the others from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level()


class TextStream:
    """Tokens in, whole characters out: what ends within a character waits for the rest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)

    def push(self, tokens: Sequence[int]) -> str:
        return "".join(self._decoder.step(self._tokenizer, int(token)) or "" for token in tokens)


class _Generation(Extension):
    """``{% generation %}`` marks what a model wrote, for training; here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012 (declared by the base class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that chat templates are written for; they come with a model and are not trusted."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {item["name"]: item["template"] for item in template}
        template = named.get("default")
    return template


def _content(token: Any) -> str:
    """A token's text, which some files wrap into an object."""
    return str(token["content"] if isinstance(token, dict) else token)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
