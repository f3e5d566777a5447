"""A loss of the operator's whitelist, on real processes: loaded by the rank and checked by the gateway."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import tinker
from tinker import types

from twinkle_serve.testing.server import RunningServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def client(server: RunningServer) -> Iterator[tinker.TrainingClient]:
    with tinker.ServiceClient(base_url=server.url, api_key="tml-whitelist") as service:
        yield service.create_lora_training_client(base_model="llama", rank=4).result()


def datum(**inputs: list[float]) -> types.Datum:
    targets = types.TensorData(data=[7, 8, 9], dtype="int64", shape=[3])
    others = {name: types.TensorData(data=data, dtype="float32") for name, data in inputs.items()}
    return types.Datum(
        model_input=types.ModelInput.from_ints([5, 7, 8]), loss_fn_inputs={"target_tokens": targets, **others}
    )


def test_it_is_served_by_its_name(client: tinker.TrainingClient) -> None:
    data = [datum(weights=[0.0, 1.0, 2.0]), datum(weights=[1.0, 1.0, 1.0])]
    # A loss that no SDK knows; its type says otherwise, and nothing looks.
    named: types.LossFnType = "focal_cross_entropy"  # type: ignore[assignment]
    found = client.forward_backward(data, named, {"gamma": 1.0}).result()
    expected = doubt = 0.0
    for each, output in zip(data, found.loss_fn_outputs, strict=True):
        weights, logprobs = each.loss_fn_inputs["weights"].data, output["logprobs"].data
        for weight, logprob in zip(weights, logprobs, strict=True):
            expected -= (1 - math.exp(logprob)) * logprob * weight
            doubt += (1 - math.exp(logprob)) * weight
    assert found.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)
    assert found.metrics["doubt:sum"] == pytest.approx(doubt, rel=1e-5)
    client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    after = client.forward(data, named, {"gamma": 1.0}).result()
    assert after.metrics["loss:sum"] < found.metrics["loss:sum"]


def test_what_it_does_not_take_is_refused_by_name(client: tinker.TrainingClient) -> None:
    named: types.LossFnType = "focal_cross_entropy"  # type: ignore[assignment]
    with pytest.raises(tinker.RequestFailedError, match=r"weights is missing; focal_cross_entropy needs"):
        client.forward_backward([datum()], named).result()
    with pytest.raises(tinker.RequestFailedError, match=r"unknown to focal_cross_entropy; its settings"):
        client.forward_backward([datum(weights=[1.0] * 3)], named, {"beta": 1.0}).result()


def test_others_are_refused_with_the_list_and_how_to_apply(client: tinker.TrainingClient) -> None:
    unknown: types.LossFnType = "mine"  # type: ignore[assignment]
    with pytest.raises(tinker.RequestFailedError, match=r"gspo, focal_cross_entropy\. .*losses CONFIG add"):
        client.forward_backward([datum(weights=[1.0] * 3)], unknown).result()
    with pytest.raises(tinker.RequestFailedError, match=r"no public formula.*importance_sampling, ppo"):
        client.forward_backward([datum(weights=[1.0] * 3)], "stable_reinforce").result()
