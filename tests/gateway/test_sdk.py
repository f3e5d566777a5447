"""Real SDKs against the service in one process: the same numbers from releases in between (the oldest are
tested end to end), and errors that help."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.gateway.inprocess import serving
from tests.protocol import sdk_bodies as sdk
from twinkle_serve.config import Config
from twinkle_serve.gateway import service
from twinkle_serve.testing.sdk import sdk_release

# The SDK's own warnings are not ours.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PROGRAM = Path(__file__).parent.parent / "e2e" / "sdk_program.py"
CURRENT = tinker.__version__
OLD = ["0.18.0", "0.25.0"]
STEP = types.AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def url(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from twinkle_serve.testing.server import free_port

    tree = {
        "models": [{"name": "llama", "path": str(tiny_llama), "num_threads": 1, "device": "cpu"}],
        "storage": {"root": str(tmp_path_factory.mktemp("store"))},
        "http": {"port": free_port()},
    }
    with serving(Config.model_validate(tree)) as url:
        yield url


@pytest.fixture(scope="module")
def run_program(url: str, models_root: Path) -> Callable[[str], dict[str, Any]]:
    """The program of the end-to-end tests under a release of the SDK; what it saw, ids left out."""

    def run(version: str) -> dict[str, Any]:
        environment = os.environ | {"TINKER_TELEMETRY": "0"}
        if version != CURRENT:
            environment["PYTHONPATH"] = str(sdk_release(models_root, version))
        done = subprocess.run(
            [sys.executable, str(PROGRAM), url, "llama"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        # JSON carries as many digits as float32 has, protobuf its bits.
        seen["logprobs"] = np.float32(seen["logprobs"]).tolist()
        return {key: value for key, value in seen.items() if key not in ("paths", "runs", "custom")}

    return run


@pytest.fixture(scope="module")
def seen_now(run_program: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return run_program(CURRENT)


@pytest.mark.parametrize("version", OLD)
def test_an_old_sdk_sees_the_same_numbers(
    run_program: Callable[[str], dict[str, Any]], seen_now: dict[str, Any], version: str
) -> None:
    assert run_program(version) == seen_now


@pytest.fixture(autouse=True)
def _clients_end_with_their_test() -> Iterator[None]:
    """Left alone they would send heartbeats, from a thread of this process, to the end of the session."""
    yield
    while _clients:
        _clients.pop().close("success").result()
    with warnings.catch_warnings():
        # The SDK leaves sockets to the collector, which would complain in the middle of another test.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


_clients: list[tinker.ServiceClient] = []


def connect(url: str, key: str) -> tinker.ServiceClient:
    _clients.append(tinker.ServiceClient(base_url=url, api_key=key))
    return _clients[-1]


def client_of(url: str, key: str = "tml-sdk") -> tinker.TrainingClient:
    return connect(url, key).create_lora_training_client("llama", rank=4, seed=3)


@pytest.mark.parametrize("parallel", [False, True])
def test_chunks_add_up(url: str, monkeypatch: pytest.MonkeyPatch, parallel: bool) -> None:
    """Compressed, split and, when parallel, arriving with the first chunk last."""
    data = [sdk.cross_entropy(range(5 + i, 12 + 2 * i)) for i in range(5)]

    def train() -> list[Any]:
        client = client_of(url)
        passes = []
        for _ in range(3):
            passes.append(client.forward_backward(data, "cross_entropy"))
            client.optim_step(STEP).result()
        return [future.result() for future in passes]

    whole = train()
    split = {"parallel_fwdbwd_chunks": parallel, "fwdbwd_max_chunk_len": 2, "proto_compress_fwdbwd": True}
    monkeypatch.setattr(service, "CLIENT_CONFIG", service.CLIENT_CONFIG | split)
    for one, other in zip(whole, train(), strict=True):
        assert other.metrics["loss:sum"] == pytest.approx(one.metrics["loss:sum"], rel=1e-5)
        assert len(other.loss_fn_outputs) == len(one.loss_fn_outputs) == 5


def wrong(**inputs: Any) -> list[types.Datum]:
    return [sdk.datum([1, 2, 3], **inputs)]


OK = {"target_tokens": [1, 2, 3], "weights": [1.0, 1.0, 1.0]}


@pytest.mark.parametrize(
    ("data", "loss_fn", "config", "message"),
    [
        (wrong(**OK | {"weights": [1.0]}), "cross_entropy", None, "weights has length 1"),
        (wrong(**OK | {"weights": [1.0, math.nan, 1.0]}), "cross_entropy", None, "not a finite"),
        (wrong(**OK | {"target_tokens": [1, 2, 10**6]}), "cross_entropy", None, "outside the vocabulary"),
        ([sdk.datum([10**6], target_tokens=[1])], "cross_entropy", None, "outside the vocabulary"),
        ([sdk.cross_entropy([1] * 5000)], "cross_entropy", None, "at most 4096"),
        (wrong(), "cross_entropy", None, "target_tokens is missing"),
        (wrong(**OK), "ppo", None, "logprobs is missing"),
        (wrong(**OK), "huber", None, "served are cross_entropy"),
        (wrong(**OK), "stable_reinforce", None, "no public formula"),
        (wrong(**OK), "cross_entropy", {"beta": 1.0}, "unknown to cross_entropy"),
    ],
)
def test_bad_data_fails_its_own_future_and_nothing_else(
    url: str, data: Any, loss_fn: Any, config: Any, message: str
) -> None:
    client = client_of(url, "tml-bad")
    started = time.monotonic()
    future = client.forward_backward(data, loss_fn, config)
    with pytest.raises(tinker.RequestFailedError, match=message) as caught:
        future.result()
    assert caught.value.category == "user"
    assert time.monotonic() - started < 5
    good = client.forward_backward([sdk.cross_entropy()], "cross_entropy")
    client.optim_step(STEP).result()
    assert good.result().metrics["loss:sum"] > 0


def test_bad_steps_and_names_fail_in_their_turn(url: str) -> None:
    client = client_of(url, "tml-bad")
    step = client.optim_step(types.AdamParams(learning_rate=-1.0))
    save = client.save_state("a/b")
    load = client.load_state("tinker://nobody:train:0/weights/none")
    for future, message in ((step, "learning_rate"), (save, "checkpoint's name"), (load, "nobody")):
        with pytest.raises(tinker.RequestFailedError, match=message):
            future.result()
    assert client.save_state("fine").result().path.endswith("/weights/fine")


def test_a_rank_or_model_that_is_not_served(url: str) -> None:
    holder = connect(url, "tml-bad")
    with pytest.raises(tinker.BadRequestError, match="1 to 32"):
        holder.create_lora_training_client("llama", rank=33).result()
    with pytest.raises(tinker.NotFoundError, match="llama"):
        holder.create_lora_training_client("gpt-5", rank=4).result()


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt is empty"),
        ([10**6], {}, "outside the vocabulary"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1] * 5000, {}, "at most 4096"),
    ],
)
def test_bad_samples(url: str, prompt: list[int], params: dict[str, Any], message: str) -> None:
    holder = connect(url, "tml-bad")
    sampler = holder.create_sampling_client(base_model="llama").result()
    sampling = types.SamplingParams(max_tokens=2, **params)
    with pytest.raises(tinker.RequestFailedError, match=message):
        sampler.sample(types.ModelInput.from_ints(prompt), 1, sampling).result()
    fine = sampler.sample(types.ModelInput.from_ints([5]), 1, types.SamplingParams(max_tokens=2)).result()
    assert len(fine.sequences[0].tokens) <= 2


def test_another_key_sees_nothing(url: str) -> None:
    client = client_of(url, "tml-one")
    path = client.save_state("mine").result().path
    stranger = connect(url, "tml-two")
    with pytest.raises(tinker.NotFoundError):
        stranger.create_training_client_from_state(path).result()
    rest = tinker.RestClient(base_url=url, api_key="tml-two")
    with pytest.raises(tinker.NotFoundError):
        rest.get_training_run(client.model_id).result()
    assert rest.list_training_runs().result().training_runs == []
