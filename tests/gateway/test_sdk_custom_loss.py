"""The newest SDK's create_custom_loss on the whole service in one process: run here or in the client, the
same numbers; and a hostile upload leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from tests.engine.traced import LOSSES, distilled, reinforce, wire
from tests.gateway.inprocess import serving
from twinkle_serve.config import Config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("no_stray_sockets"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
KEY = "tml-custom"


@pytest.fixture(scope="module")
def urls(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, str]]:
    """By whether uploaded losses run on the server."""
    from twinkle_serve.testing.server import free_port

    def config(server_side: bool) -> Config:
        return Config.model_validate(
            {
                "models": [{"name": "llama", "path": str(tiny_llama), "num_threads": 1, "device": "cpu"}],
                "storage": {"root": str(tmp_path_factory.mktemp("store"))},
                "http": {"port": free_port()},
                "losses": {"custom_loss_server_side": server_side},
            }
        )

    with serving(config(True)) as here, serving(config(False)) as there:
        yield {True: here, False: there}


def datums(ranks: dict[str, Any]) -> list[types.Datum]:
    rng = np.random.default_rng(5)
    data = []
    for length in (6, 3, 4):
        inputs = {}
        for name, rank in ranks.items():
            shape = (length, 3)[:rank]
            if name == "logprobs":
                inputs["target_tokens"] = rng.integers(3, 300, shape)
            elif name == "index":
                inputs[name] = rng.integers(0, length, shape)
            else:
                # A scalar is data of one number with an empty shape.
                inputs[name] = np.asarray(rng.random(shape), np.float32) + np.float32(0.1)
        tensors = {
            name: types.TensorData(
                data=np.ravel(values).tolist(),
                dtype="int64" if np.issubdtype(np.asarray(values).dtype, np.integer) else "float32",
                shape=list(np.shape(values)),
            )
            for name, values in inputs.items()
        }
        tokens = types.ModelInput.from_ints(rng.integers(3, 300, length).tolist())
        data.append(types.Datum(model_input=tokens, loss_fn_inputs=tensors))
    return data


def train(url: str, loss: Any, ranks: dict[str, Any]) -> dict[str, Any]:
    """Two steps with a loss; its metrics, and what the trained adapter says then."""
    with tinker.ServiceClient(base_url=url, api_key=KEY) as service:
        client = service.create_lora_training_client(base_model="llama", rank=4, seed=7).result()
        handle = service.create_custom_loss(loss, ranks).result()
        data = datums(ranks)
        metrics = []
        for _ in range(2):
            backward = client.forward_backward_custom(data, handle)
            client.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-4)).result()
            found = backward.result()
            metrics.append({k: v for k, v in found.metrics.items() if k[:7] in ("custom/", "loss:su")})
        plain = {"logprobs": 2 if ranks["logprobs"] == 2 else 1}
        after = client.forward(datums(plain), "cross_entropy").result()
        return {
            "on the server": handle.loss_id is not None,
            "metrics": metrics,
            "shapes": [each["logprobs"].shape for each in found.loss_fn_outputs],
            "after": [value for each in after.loss_fn_outputs for value in each["logprobs"].data],
        }


@pytest.mark.parametrize(("loss", "ranks"), LOSSES, ids=lambda each: getattr(each, "__name__", ""))
def test_run_here_or_in_the_client_it_is_the_same(
    urls: dict[bool, str], loss: Any, ranks: dict[str, Any]
) -> None:
    here, there = train(urls[True], loss, ranks), train(urls[False], loss, ranks)
    assert (here.pop("on the server"), there.pop("on the server")) == (True, False)
    for mine, theirs in zip(here["metrics"], there["metrics"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    assert here["shapes"] == there["shapes"]
    np.testing.assert_allclose(here["after"], there["after"], rtol=1e-6, atol=1e-6)
    assert here["metrics"][0]["loss:sum"] != here["metrics"][1]["loss:sum"]


def test_a_loss_that_never_gives_a_scalar_is_refused_at_once(urls: dict[bool, str]) -> None:
    with tinker.ServiceClient(base_url=urls[True], api_key=KEY) as service:
        with pytest.raises(tinker.RequestFailedError, match=r"must return a scalar float tensor, got \[24\]"):
            service.create_custom_loss(lambda logprobs: (logprobs * 2, {}), {"logprobs": 1}).result()
        with pytest.raises(tinker.RequestFailedError, match=r"'torch\.rand_like' is not served"):
            service.create_custom_loss(noisy, {"logprobs": 1}).result()


def noisy(logprobs):
    import torch

    return (logprobs * torch.rand_like(logprobs)).sum(), {}


def test_what_fails_on_data_leaves_no_trace(urls: dict[bool, str]) -> None:
    """Another loss and an honest one in the same run: only the honest one counts."""

    def short(logprobs):
        return logprobs[5].square() + logprobs.sum(), {}

    def run(with_failure: bool) -> list[float]:
        with tinker.ServiceClient(base_url=urls[True], api_key=KEY) as service:
            client = service.create_lora_training_client(base_model="llama", rank=4, seed=7).result()
            data = datums({"logprobs": 1, "advantages": 1})
            honest = service.create_custom_loss(reinforce, {"logprobs": 1, "advantages": 1}).result()
            client.forward_backward_custom(data, honest).result()
            if with_failure:
                handle = service.create_custom_loss(short, {"logprobs": 1}).result()
                with pytest.raises(tinker.RequestFailedError, match=r"node 'getitem'.*index 5 is out of"):
                    client.forward_backward_custom(data, handle).result()
            client.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-4)).result()
            after = client.forward(datums({"logprobs": 1}), "cross_entropy").result()
            return [value for each in after.loss_fn_outputs for value in each["logprobs"].data]

    assert run(with_failure=True) == run(with_failure=False)


def test_sessions_and_tenants_are_apart(urls: dict[bool, str]) -> None:
    headers = {"X-API-Key": KEY}
    with httpx.Client(base_url=f"{urls[True]}/api/v1", headers=headers, trust_env=False) as http:
        session = http.post("/create_session", json={}).json()["session_id"]
        fields = wire(distilled, logprobs=2, teacher=2)
        body = {"session_id": session, "custom_loss_seq_id": 0, **fields}
        strange = http.post("/create_custom_loss", json=body, headers={"X-API-Key": "tml-eve"})
        assert strange.status_code == 404
        first, second = (http.post("/create_custom_loss", json=body).json() for _ in range(2))
        assert first == second
        result = http.post("/retrieve_future", json=first).json()
        assert result == {"loss_id": f"{session}:loss:0"}
        assert http.post("/retrieve_future", json=first, headers={"X-API-Key": "tml-eve"}).status_code == 404
