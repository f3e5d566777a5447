from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker import types

from twinkle_serve.protocol import requests as wire
from twinkle_serve.protocol.data import AdamParams
from twinkle_serve.protocol.errors import UserError


def test_null_and_missing_are_alike_and_the_unknown_is_ignored() -> None:
    bare = wire.read(wire.SaveWeights, {})
    assert bare == wire.read(wire.SaveWeights, {"path": None, "overwrite": None, "ttl_seconds": None})
    assert bare == wire.read(wire.SaveWeights, {"type": "whatever", "model_id": "m", "novel": [1]})
    assert (bare.path, bare.overwrite, bare.ttl_seconds) == (None, False, None)


def test_a_setting_that_nobody_knows_is_refused() -> None:
    """Or the run would train with the default, and nobody would know."""
    step = wire.read(wire.OptimStep, {"adam_params": {"learning_rte": 5e-3}})
    with pytest.raises(
        UserError, match=r"^adam_params: .*there is no 'learning_rte'; there are learning_rate,"
    ):
        step.as_params()
    create = {"session_id": "s", "model_seq_id": 0, "base_model": "m"}
    with pytest.raises(UserError, match=r"^lora_config: .*there is no 'alpha'; there are rank,"):
        wire.read(wire.CreateModel, create | {"lora_config": {"rank": 8, "alpha": 64}})
    wire.read(wire.CreateModel, create | {"lora_config": {"rank": 8, "alpha": None, "type": "lora"}})
    assert wire.read(wire.OptimStep, {"adam_params": {"type": "adam"}}).as_params() == AdamParams()


def test_defaults_of_a_step_are_the_sdks() -> None:
    from tinker.types import AdamParams as SdkParams

    sdk = SdkParams()
    ours = wire.read(wire.OptimStep, {}).as_params()
    assert ours == AdamParams()
    for name in ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"):
        assert getattr(ours, name) == getattr(sdk, name)


@pytest.mark.parametrize("key", ["adam_params", "optimizer_params", "optim_params"])
def test_a_step_goes_by_three_names(key: str) -> None:
    params = wire.read(wire.OptimStep, {key: {"learning_rate": 0.5, "type": "adamw"}}).as_params()
    assert params.learning_rate == 0.5


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"learning_rate": -1e-9}, "learning_rate is -1e-09; it must be finite and at least 0"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"beta1": 1.0}, "beta1 is 1.0; it must be at least 0 and below 1"),
        ({"beta1": -0.1}, "beta1"),
        ({"beta2": 1.5}, "beta2"),
        ({"beta2": math.nan}, "beta2"),
        ({"eps": 0}, "eps is 0.0; it must be above 0|eps is 0; it must be above 0"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"grad_clip_norm": math.inf}, "grad_clip_norm"),
        ({"learning_rate": "fast"}, "adam_params.learning_rate"),
        ({"learning_rate": [1]}, "adam_params.learning_rate"),
        ({"type": "dimuon"}, "dimuon.*adamw is"),
        ("x", "adam_params"),
    ],
)
def test_a_wrong_step_is_named(params: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        wire.read(wire.OptimStep, {"adam_params": params}).as_params()


def test_no_clipping_may_be_said_with_a_negative_number() -> None:
    assert wire.read(wire.Adam, {"grad_clip_norm": -1.0}).as_params().grad_clip_norm == 0.0


@pytest.mark.parametrize("rank", [0, -1, 33, 10**6])
def test_ranks_end_at_32(rank: int) -> None:
    with pytest.raises(UserError, match=f"rank is {rank}; 1 to 32"):
        wire.read(wire.LoraConfig, {"rank": rank}).as_spec(wire.MAX_RANK)


def test_a_lora_config_as_the_sdk_sends_it() -> None:
    body = types.LoraConfig(rank=16, seed=-5, train_mlp=False).model_dump(mode="json")
    spec = wire.read(wire.LoraConfig, body).as_spec(32)
    assert (spec.rank, spec.train_attn, spec.train_mlp, spec.train_unembed) == (16, True, False, True)
    assert spec.seed == 2**63 - 5
    nothing = {"rank": 4, "train_attn": False, "train_mlp": False, "train_unembed": False}
    with pytest.raises(UserError, match="trains nothing"):
        wire.read(wire.LoraConfig, nothing).as_spec(32)


@given(st.integers())
def test_seeds_fold_into_63_bits(seed: int) -> None:
    folded = wire.fold_seed(seed)
    assert 0 <= folded < 2**63
    assert folded == seed or not 0 <= seed < 2**63


@pytest.mark.parametrize("ttl", [0, 3599, 10**10, "x", 3600.5])
def test_lifetimes_have_limits(ttl: Any) -> None:
    with pytest.raises(UserError, match="ttl_seconds"):
        wire.read(wire.SetTtl, {"ttl_seconds": ttl})


def test_lifetimes() -> None:
    assert wire.read(wire.SetTtl, {"ttl_seconds": 3600}).ttl_seconds == 3600
    assert wire.read(wire.SetTtl, {"ttl_seconds": None}).ttl_seconds is None


def test_errors_name_every_field_but_show_no_values() -> None:
    with pytest.raises(UserError) as caught:
        wire.read(wire.CreateModel, {"session_id": ["secret"], "lora_config": {"rank": "secret"}})
    message = str(caught.value)
    for name in ("session_id", "model_seq_id", "base_model", "lora_config.rank"):
        assert name in message
    assert "secret" not in message


def test_only_adamw_can_be_chosen() -> None:
    wire.check_optimizer({})
    wire.check_optimizer({"type": "adamw"})
    with pytest.raises(UserError, match="dimuon"):
        wire.check_optimizer({"type": "dimuon", "version": 1})


@pytest.mark.parametrize("value", [2**63, "1" + "0" * 240, -1])
def test_counters_fit_names_of_files(value: Any) -> None:
    fields = {"session_id": "s", "model_seq_id": value, "base_model": "b", "lora_config": {"rank": 1}}
    with pytest.raises(UserError, match="model_seq_id"):
        wire.read(wire.CreateModel, fields)
    with pytest.raises(UserError, match="sampling_session_seq_id"):
        wire.read(wire.SaveForSampler, {"sampling_session_seq_id": value})


def test_metadata_that_is_nested_too_deeply_is_named() -> None:
    value: Any = 1
    for _ in range(10**5):
        value = [value]
    with pytest.raises(UserError, match="user_metadata"):
        wire.as_strings({"a": value})
    with pytest.raises(UserError, match=r"user_metadata: .*nested too deeply"):
        wire.read(wire.CreateSession, {"user_metadata": {"a": value}})


KEPT = wire.MAX_KEPT_BYTES
BARE = {"session_id": "s", "model_seq_id": 0, "base_model": "b", "lora_config": {"rank": 1}, "path": "p"}


@pytest.mark.parametrize(
    ("model", "field", "full", "over"),
    [
        *(
            # {"k": "..."} and ["..."] with what JSON puts around them; "é" has two bytes.
            (model, "user_metadata", {"k": "é" * (KEPT // 2 - 4 - 1) + "x"}, {"k": "é" * (KEPT // 2 - 4)})
            for model in (
                wire.CreateSession,
                wire.CreateModel,
                wire.SaveWeights,
                wire.SaveForSampler,
                wire.SaveExternal,
                wire.CreateFromWeights,
            )
        ),
        (wire.CreateSession, "tags", ["x" * (KEPT - 4)], ["x" * (KEPT - 3)]),
        (wire.CreateSession, "display_name", "x" * 1024, "x" * 1025),
        (wire.CreateSession, "sdk_version", "x" * 1024, "x" * 1025),
        (wire.CreateSession, "project_id", "x" * 128, "x" * 129),
        (wire.FinishSession, "reason", {"type": "x" * (KEPT - 12)}, {"type": "x" * (KEPT - 11)}),
        (wire.FinishSession, "detail", "x" * (KEPT - 2), "x" * (KEPT - 1)),
    ],
)
def test_what_is_kept_has_a_limit(model: type[wire.Lenient], field: str, full: Any, over: Any) -> None:
    assert getattr(wire.read(model, BARE | {field: full}), field) == full
    with pytest.raises(UserError, match=rf"^{field}: .*at most"):
        wire.read(model, BARE | {field: over})


def test_several_fields_at_their_limits_fit_a_small_body() -> None:
    large = {"k": "é" * (KEPT // 2 - 5)}
    body = json.dumps({"user_metadata": large, "tags": list(large.values()), "display_name": "é" * 1024})
    assert len(body) < wire.MAX_SMALL_BODY_BYTES
    wire.read(wire.CreateSession, json.loads(body))


def test_metadata_becomes_strings() -> None:
    assert wire.as_strings({"a": "x", "b": 1, "c": None, "d": {"e": ["é"]}}) == {
        "a": "x",
        "b": "1",
        "c": "null",
        "d": '{"e": ["é"]}',
    }


MODELS = [kind for kind in vars(wire).values() if isinstance(kind, type) and issubclass(kind, wire.Lenient)]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=25)
@given(data=st.data())
def test_any_json_is_read_or_refused(model: type[wire.Lenient], data: st.DataObject) -> None:
    names = st.sampled_from([*model.model_fields, "x"])
    body = data.draw(st.dictionaries(names, json_values))
    try:
        wire.read(model, body)
    except UserError:
        return
