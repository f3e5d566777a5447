"""The table of metrics, and the meter that remembers."""

from __future__ import annotations

import re

import pytest

from twinkle_serve.control.metrics import (
    BY_NAME,
    METRICS,
    Tally,
    TenantLabels,
    markdown,
    tenant_hash,
)


def test_names_are_unique_and_fit_prometheus() -> None:
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
        assert metric.text
        assert (metric.kind == "histogram") == bool(metric.boundaries)
        assert list(metric.boundaries) == sorted(metric.boundaries)


def test_a_counter_is_exported_with_total() -> None:
    assert BY_NAME["tokens"].exported == "ray_twinkle_tokens_total"
    assert BY_NAME["kv_blocks"].exported == "ray_twinkle_kv_blocks"


def test_the_page_has_a_row_for_each_metric() -> None:
    rows = markdown().splitlines()
    assert len(rows) == len(METRICS) + 2
    assert all(f"`{metric.exported}`" in row for metric, row in zip(METRICS, rows[2:], strict=True))


def test_a_tally_adds_sets_and_remembers() -> None:
    tally = Tally()
    tally.add("tokens", 3, model="m", kind="train", tenant="a")
    tally.add("tokens", 4, model="m", kind="train", tenant="b")
    tally.add("tokens", 5, model="m", kind="sampled", tenant="b")
    tally.set("kv_blocks", 1, model="m")
    tally.set("kv_blocks", 2, model="m")
    tally.observe("tick_seconds", 0.5, model="m")
    assert tally.total("tokens", model="m") == 12
    assert tally.total("tokens", kind="train") == 7
    assert tally.values["kv_blocks", (("model", "m"),)] == 2
    assert tally.names == {"tokens", "kv_blocks", "tick_seconds"}


@pytest.mark.parametrize(
    ("method", "name", "labels"),
    [
        ("set", "tokens", {"model": "m", "kind": "train", "tenant": "a"}),
        ("add", "tokens", {"model": "m"}),
        ("add", "tokens", {"model": "m", "kind": "train", "tenant": "a", "run": "r"}),
    ],
)
def test_another_kind_or_other_labels_are_a_bug(method: str, name: str, labels: dict[str, str]) -> None:
    with pytest.raises(AssertionError):
        getattr(Tally(), method)(name, 1, **labels)


def test_an_undocumented_name_is_a_bug() -> None:
    with pytest.raises(KeyError):
        Tally().set("new_number", 1, model="m")


def test_a_tenants_label_is_neither_its_name_nor_changing() -> None:
    assert tenant_hash("alice") == tenant_hash("alice") != tenant_hash("bob")
    assert "alice" not in tenant_hash("alice")


def test_tenant_labels_are_bounded() -> None:
    labels = TenantLabels(most=2)
    first = labels.of("a")
    labels.of("b")
    assert labels.of("c") == labels.of("d") == "other"
    assert labels.of("a") == first == tenant_hash("a")
