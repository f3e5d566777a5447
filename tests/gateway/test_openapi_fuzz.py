"""What the API page allows, and what it does not, sent to the real control plane: never a 5xx, never a hang,
and no more memory than bodies may take."""

from __future__ import annotations

import asyncio
import gc
import json
import tempfile
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gateway.world import API, Tenant, World, make_config, world
from twinkle_serve.gateway.app import create_app
from twinkle_serve.protocol import schema
from twinkle_serve.protocol.results import PROTOBUF

QUIET = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
PAGE = create_app(lambda: None, make_config(Path("/nowhere"))).openapi()  # type: ignore[arg-type,return-value]
SCHEMA = schemathesis.openapi.from_dict(PAGE)
PATIENCE_S = 20.0
MIB = 2**20


class Loop:
    """A world that lives through all examples of this module, in a loop of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._stack = AsyncExitStack()
        root = Path(tempfile.mkdtemp())
        limits = {"tenant": {"live_runs": 2, "pending_requests": 50, "http_requests": 16}}
        http = {"poll_hold_s": 0.01, "max_body_bytes": 4 * MIB}
        made = world(root, limits=limits, http=http)
        self.world: World = self.run(self._stack.enter_async_context(made))
        self.owner: Tenant = self.run(self.world.tenant("tml-owner").settle())

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, PATIENCE_S))

    def close(self) -> None:
        self.run(self._stack.aclose())
        self.loop.close()

    def send(self, method: str, url: str, **options: Any) -> httpx.Response:
        answer: httpx.Response = self.run(self.owner.request(method, url, **options))
        assert answer.status_code < 500 or "has not arrived" in answer.text, answer.text
        if answer.status_code >= 400 and answer.status_code != 408:
            assert answer.json()["detail"]
        return answer


@pytest.fixture(scope="module")
def here() -> Any:
    loop = Loop()
    yield loop
    loop.close()


def fields_of(here: Loop, path: str) -> dict[str, str]:
    """Real ids for the path, so that what is behind the check for them is reached too."""
    own = here.owner.objects
    return {"run_id": own["run"], "session_id": own["session"], "sampler_id": own["sampler"]}


@SCHEMA.parametrize()
@QUIET
def test_what_the_api_page_describes(here: Loop, case: schemathesis.Case) -> None:
    """Bodies and queries as described, with ids that exist in half of the cases."""
    path = case.path
    arguments = dict(case.path_parameters or {})
    body = case.body if isinstance(case.body, dict | list | str | int | float | type(None)) else {}
    if len(json.dumps(arguments, default=str)) % 2:
        real = fields_of(here, path)
        arguments = {key: real.get(key, value) for key, value in arguments.items()}
        if isinstance(body, dict):
            names = {"model_id": "run", "session_id": "session", "sampling_session_id": "sampler"}
            body = body | {k: here.owner.objects[v] for k, v in names.items() if k in body}
    for key, value in arguments.items():
        path = path.replace(
            "{" + key + "}",
            httpx.URL("http://x").copy_with(path="/" + str(value)).raw_path.decode()[1:] or "x",
        )
    query = {k: v for k, v in (case.query or {}).items() if isinstance(v, str | int | float | bool)}
    answer = here.send(case.method.upper(), f"http://server{path}", params=query, content=_json(body))
    if path.endswith("/finish") and answer.status_code == 204:
        here.run(here.owner.settle())


def _json(body: Any) -> bytes:
    return json.dumps(body, default=str).encode("utf-8", "surrogatepass")


TENSORS = st.fixed_dictionaries(
    {
        "dtype": st.integers(0, 5),
        "shape": st.lists(st.integers(-(2**40), 2**40), max_size=3),
        "dense": st.binary(max_size=64),
    }
)
DATUMS = st.fixed_dictionaries(
    {
        "model_input": st.lists(
            st.fixed_dictionaries(
                {"encoded_text": st.fixed_dictionaries({"tokens": st.binary(max_size=64)})}
            ),
            max_size=2,
        ),
        "loss_fn_inputs": st.dictionaries(
            st.sampled_from(["target_tokens", "weights", "advantages", "x"]), TENSORS, max_size=3
        ),
    }
)


@settings(QUIET, max_examples=40)
@given(
    datums=st.lists(DATUMS, max_size=3),
    seq_id=st.integers(-5, 2**31 - 1),
    loss=st.sampled_from(["cross_entropy", "ppo", "", "custom", "\x00"]),
    cut=st.integers(0, 200),
)
def test_protobuf_of_any_content_and_cut_anywhere(
    here: Loop, datums: list[Any], seq_id: int, loss: str, cut: int
) -> None:
    message = schema.ForwardBackwardRequest(
        model_id=here.owner.objects["run"], seq_id=seq_id, data=datums, loss_fn=loss
    )
    content = message.SerializeToString()
    for body in (content, content[:cut]):
        here.send("POST", f"{API}/forward_backward", content=body, headers={"Content-Type": PROTOBUF})


NASTY = [
    "%2e%2e", "..%2f..%2fetc%2fpasswd", "%00", "a%00b", "%2Fetc%2Fpasswd", "a%2Fb", "%5c..%5c",
    "%F0%9F%92%A9", "%ff%fe", "a" * 5000, "$(id)", "-", "con", "CON", "%0d%0aX: y",
]  # fmt: skip


@pytest.mark.parametrize("name", NASTY)
def test_names_and_paths_cannot_escape(here: Loop, name: str, tmp_path: Path) -> None:
    own = here.owner.objects["run"]
    for path in (
        f"training_runs/{name}", f"training_runs/{name}/checkpoints", f"sessions/{name}", f"samplers/{name}",
        f"training_runs/{own}/checkpoints/weights/{name}/archive",
        f"training_runs/{own}/checkpoints/{name}/a/external_weights_urls",
        f"training_runs/{name}/checkpoints/weights/a/archive",
        f"downloads/{own}/weights/a/{name}?tenant=x&expires=9999999999&token=00",
    ):  # fmt: skip
        answer = here.send("GET", f"{API}/{path}")
        assert answer.status_code in (400, 401, 404, 422), (path, answer.status_code)
    text = httpx.URL(f"http://x/{name}").path[1:]
    for kind in ("save_weights", "save_weights_for_sampler", "save_weights_external"):
        body = {"model_id": own, "seq_id": None, "path": f"../{text}"}
        promised = here.send("POST", f"{API}/{kind}", json=body)
        if promised.status_code == 200:
            told = here.send(
                "POST", f"{API}/retrieve_future", json={"request_id": promised.json()["request_id"]}
            )
            assert told.status_code == 408 or "letters, digits" in told.json()["error"]


def test_errors_name_no_path_of_the_server_and_no_traceback(here: Loop) -> None:
    for method, path, body in (
        ("POST", "weights_info", {"tinker_path": "tinker://nobody/weights/a"}),
        ("POST", "weights_info", {"tinker_path": ["x"]}),
        ("POST", "create_model", {"session_id": 1}),
        ("GET", "nothing/here", None),
        ("POST", "load_weights", {"model_id": here.owner.objects["run"], "path": "/etc/passwd"}),
    ):
        text = here.send(method, f"{API}/{path}", json=body).text
        for word in ("Traceback", "site-packages", ".py", str(Path.cwd()), tempfile.gettempdir()):
            assert word not in text


def empty_datums(here: Loop) -> bytes:
    """As many as a body has room for."""
    request = schema.ForwardBackwardRequest(model_id=here.owner.objects["run"], loss_fn="cross_entropy")
    request.MergeFromString(b"\x1a\x00" * (2 * MIB - 100))
    body: bytes = request.SerializeToString()
    return body


@pytest.mark.parametrize("bomb", ["zeros", "nested", "many", "datums"])
def test_bombs_take_no_more_memory_than_bodies_may(here: Loop, bomb: str) -> None:
    makers: dict[str, Callable[[], tuple[bytes, dict[str, str]]]] = {
        "zeros": lambda: (zstandard.compress(bytes(512 * MIB)), {"Content-Encoding": "zstd"}),
        "nested": lambda: (b"[" * (3 * MIB), {}),
        "many": lambda: (b'{"a":' * (MIB // 2) + b"1" + b"}" * (MIB // 2), {}),
        "datums": lambda: (empty_datums(here), {"Content-Type": PROTOBUF}),
    }
    content, headers = makers[bomb]()
    gc.collect()
    tracemalloc.start()
    for path in ("create_session", "forward_backward", "asample", "telemetry"):
        answer = here.send("POST", f"{API}/{path}", content=content, headers=headers)
        assert answer.status_code in (200, 400, 413, 429, 503)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 128 * MIB


async def test_a_body_without_an_announced_length_is_bounded_too(tmp_path: Path) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(64 * 1024)

    async with world(tmp_path, http={"max_body_bytes": MIB}) as here:
        caller = here.tenant("tml-a")
        request = caller.request("POST", f"{API}/create_session", content=endless())
        answer = await asyncio.wait_for(request, PATIENCE_S)
        assert answer.status_code == 413
