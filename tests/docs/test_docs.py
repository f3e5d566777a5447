"""The documents lead nowhere wrong: links, anchors, settings, metrics and programs in them exist."""

from __future__ import annotations

import ast
import logging
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config as load_mkdocs_config
from pydantic import BaseModel

from twinkle_serve.config import Config
from twinkle_serve.control.custom_losses import PER_TENANT
from twinkle_serve.control.metrics import METRICS
from twinkle_serve.engine import graph_loss
from twinkle_serve.protocol import loss_graph

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for folder in ("", "docs", "benchmarks", "examples", "deployments")
    for path in (ROOT / folder).glob("*.md")
)
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)


def outside_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def anchors_of(document: Path) -> set[str]:
    """As GitHub and mkdocs make them of headings."""
    titles = re.findall(r"^#+ (.+)$", outside_code(document.read_text()), re.M)
    words = [re.sub(r"[^\w\- ]", "", title.lower()).strip() for title in titles]
    return {word.replace(" ", "-") for word in words}


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", outside_code(document.read_text())):
        if re.match(r"[a-z]+:", link):
            assert link.startswith(("https://", "mailto:")), link
            continue
        place, _, anchor = link.partition("#")
        target = document if not place else (document.parent / unquote(place))
        assert target.exists(), f"{link} in {document.name}"
        if anchor:
            assert anchor in anchors_of(target), f"{link} in {document.name}"


@each_document
def test_programs_are_python(document: Path) -> None:
    for program in re.findall(r"^```python\n(.*?)^```", document.read_text(), re.S | re.M):
        ast.parse(program)


def keys_of(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Every key of the configuration, list items by N."""
    keys = set()
    for name, field in model.model_fields.items():
        keys.add(prefix + name)
        for inner in re.findall(r"twinkle_serve\.[\w.]+", str(field.annotation)):
            module, _, attribute = inner.rpartition(".")
            found = getattr(__import__(module, fromlist=[attribute]), attribute)
            if isinstance(found, type) and issubclass(found, BaseModel):
                index = {"models": ".N.", "tenants": ".NAME."}.get(name, ".")
                keys |= keys_of(found, prefix + name + index)
    return keys | {"limits.tenants.NAME"} if not prefix else keys


KEYS = keys_of(Config)


@each_document
def test_settings_exist(document: Path) -> None:
    sections = "|".join(Config.model_fields)
    for key in re.findall(rf"`((?:{sections})\.[a-z0-9_.A-Z]+)", document.read_text()):
        assert re.sub(r"^models\.\d+\.", "models.N.", key).rstrip(".") in KEYS, f"{key} in {document.name}"


@each_document
def test_metrics_exist(document: Path) -> None:
    exported = {metric.exported for metric in METRICS}
    for name in re.findall(r"ray_twinkle_\w+", document.read_text()):
        assert name in exported, f"{name} in {document.name}"


@each_document
def test_files_that_are_named_exist(document: Path) -> None:
    folders = "deployments|examples|benchmarks|twinkle_serve|tests|docs"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", document.read_text()):
        assert (ROOT / name).exists(), f"{name} in {document.name}"


@each_document
def test_commands_exist(document: Path) -> None:
    from twinkle_serve.cli import _parser

    known = next(action.choices for action in _parser()._actions if action.choices)
    for command in re.findall(r"twinkle-serve ([a-z][a-z-]+)", document.read_text()):
        assert command in known, f"twinkle-serve {command} in {document.name}"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"`make ([a-z-]+)`", document.read_text()):
        assert target in targets, f"make {target} in {document.name}"


PROSE = {"a", "and", "as", "in", "of", "or", "the", "where"}


@each_document
def test_commands_of_pip_have_no_prose_in_them(document: Path) -> None:
    for command in re.findall(r"`(pip install [^`]+)`", document.read_text()):
        assert not PROSE & set(shlex.split(command)), f"{command} in {document.name}"


def test_where_gspo_and_dro_are_advised_stands_what_they_want_on_the_prompt() -> None:
    advice = (ROOT / "docs" / "rl.md").read_text()
    (which,) = (item for item in advice.split("\n* ") if item.startswith("**Which loss.**"))
    assert {"`gspo`", "`sequence_ratio_mask`", "`dro`"} <= set(re.findall(r"`\w+`", which))
    rule = (ROOT / "docs" / "losses.md").read_text().partition("contributes nothing")[2]
    assert re.match(r"[^.]*except in `gspo` and `dro`", rule)


def test_the_chinese_readme_says_what_the_english_one_does() -> None:
    """Section by section the same programs, settings, files and links. What was measured, and with which
    settings, stands in the English one only."""
    english, chinese = (sections_of(ROOT / name) for name in ("README.md", "README.zh.md"))
    assert len(english) == len(chinese)
    for own, other in zip(english, chinese, strict=True):
        title = own.splitlines()[0]
        assert programs_in(own) == programs_in(other), title
        if title != MEASURED:
            assert settings_in(own) == settings_in(other), title
            assert targets_in(own) <= targets_in(other), title


MEASURED = "Many tenants in one pass"


def sections_of(document: Path) -> list[str]:
    return re.split(r"^## ", document.read_text(), flags=re.M)


def programs_in(text: str) -> list[str]:
    """The blocks of code, without what is said in them."""
    blocks = re.findall(r"^```.*?^```", text, re.S | re.M)
    return [re.sub(r" +# .*$", "", block, flags=re.M) for block in blocks]


def settings_in(text: str) -> set[str]:
    """Everything in backticks that looks like a setting or a call."""
    return set(
        re.findall(r"`([a-z_]+(?:[._][a-z0-9_]+)+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    )


def targets_in(text: str) -> set[str]:
    """What is linked, and each `make` target that is named."""
    links = set(re.findall(r"\]\((?!https:)([^)\s#]+)", text))
    return {link for link in links if "results/" not in link} | set(re.findall(r"`(make [a-z-]+)`", text))


def test_the_limits_of_uploaded_losses_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "losses.md").read_text()
    for limit in (loss_graph.MAX_NODES, loss_graph.MAX_INPUTS, loss_graph.MAX_METRICS, PER_TENANT):
        assert f" {limit}" in text
    for limit in (
        *(loss_graph.MAX_TEXT_BYTES, loss_graph.MAX_NODE_RUNS),
        *(graph_loss.MAX_ELEMENTS, graph_loss.FREE_ELEMENTS, graph_loss.ELEMENTS_PER_LOGPROB),
    ):
        assert f"{limit:,}" in text


def test_every_page_is_in_the_menu() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    pages = set(re.findall(r"[\w-]+\.md", str(yaml.safe_load(text)["nav"])))
    assert pages == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_pictures_are_used_and_small() -> None:
    text = "".join(path.read_text() for path in DOCUMENTS)
    for picture in (ROOT / "docs" / "images").iterdir():
        assert f"images/{picture.name}" in text, picture
        assert picture.stat().st_size < 150_000, picture


def test_the_site_builds_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_mkdocs_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    with caplog.at_level(logging.WARNING, "mkdocs"):
        build(config)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("mkdocs")] == []
    page = (tmp_path / "configuration.html").read_text()
    assert "max_resident_adapters" in page
    monitoring = (tmp_path / "monitoring.html").read_text()
    assert all(metric.exported in monitoring for metric in METRICS)
    assert "from the code" not in page + monitoring
    for html in tmp_path.rglob("*.html"):
        loaded = re.findall(r'(?:src|href)="(https?://[^"]*\.(?:js|css|woff2?))"', html.read_text())
        assert loaded == [], "fetched from elsewhere"
