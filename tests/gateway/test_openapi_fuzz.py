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
from urllib.parse import unquote

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
WAITS = "has not arrived, and this is to come after it"  # of a request without a seq_id, to be sent again
MIB = 2**20


class Loop:
    """A world that lives through all examples of this module, in a loop of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._stack = AsyncExitStack()
        self.root = root = Path(tempfile.mkdtemp())
        limits = {"tenant": {"live_runs": 2, "pending_requests": 50, "http_requests": 16}}
        http = {"poll_hold_s": 0.01, "max_body_bytes": 4 * MIB}
        made = world(root, limits=limits, http=http)
        self.world: World = self.run(self._stack.enter_async_context(made))
        self.owner: Tenant = self.run(self.world.tenant("tml-owner").settle())
        self.taken: set[str] = set()  # routes that took a body with ids that exist

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, PATIENCE_S))

    def close(self) -> None:
        self.run(self._stack.aclose())
        self.loop.close()

    def send(self, method: str, url: str, **options: Any) -> httpx.Response:
        answer: httpx.Response = self.run(self.owner.request(method, url, **options))
        told_to_retry = answer.status_code == 503 and WAITS in answer.text
        assert answer.status_code < 500 or told_to_retry, answer.text
        if answer.status_code >= 400 and answer.status_code != 408:
            assert answer.json()["detail"]
        return answer

    def outcome(self, request_id: str) -> dict[str, Any]:
        """What a promise comes to."""
        while True:
            told = self.send("POST", f"{API}/retrieve_future", json={"request_id": request_id})
            if told.status_code != 408:
                found: dict[str, Any] = told.json()
                return found

    def start_anew(self) -> None:
        """With one of each kind of object in which nothing waits."""
        self.run(
            self.owner.request("POST", f"{API}/sessions/{self.owner.objects['session']}/finish", json={})
        )
        self.run(self.owner.settle())


@pytest.fixture(scope="module")
def here() -> Any:
    loop = Loop()
    yield loop
    loop.close()


# Fields that name an object, and which of a tenant's objects they name.
IDS = {
    "run_id": "run", "model_id": "run", "session_id": "session", "sampler_id": "sampler",
    "sampling_session_id": "sampler", "request_id": "promise", "tinker_path": "checkpoint",
    "source_path": "checkpoint", "kind": "kind", "name": "name",
}  # fmt: skip
# What a body has to have to be taken, besides its address; None: by IDS, or nothing.
NEEDED: dict[str, dict[str, Any]] = {
    "asample": {"sampling_session_id": None, "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]}},
    "copy_weights": {"destination_project_id": "p", "model_seq_id": None},
    "create_model": {"base_model": "base", "lora_config": {"rank": 8}},
    "create_sampling_session": {"base_model": "base", "model_path": None},
    "load_weights": {"model_id": None, "optimizer": False},
}
ENDS = ("/finish", "/unload_model", "/create_model", "/ttl")  # what others need is gone, or used up


def addresses() -> dict[str, list[str]]:
    """Of each route whose body says what it is about, the fields that say so and may not be missing."""
    found = {}
    for path, methods in PAGE["paths"].items():
        for method in methods.values():
            body = method.get("requestBody", {"content": {"application/json": {"schema": {}}}})
            required = body["content"]["application/json"]["schema"].get("required", [])
            names = [name for name in required if name in IDS or name.endswith("_seq_id")]
            route = path.removeprefix("/api/v1/")
            if names or route in NEEDED:
                found[route] = names
    return found


def right(here: Loop, route: str, body: dict[str, Any]) -> dict[str, Any]:
    """The body about what exists, so that what is behind the check for that is reached too."""
    own = here.owner.objects
    body = dict.fromkeys(addresses().get(route, ()), 1) | body | NEEDED.get(route, {})
    if route == "load_weights":
        body["path"] = own["checkpoint"]
    if route == "copy_weights":
        body.pop("session_id", None)  # a project is the other choice
    return body | {name: own[IDS[name]] for name in body if IDS.get(name) in own}


@SCHEMA.given(is_real=st.booleans())
@SCHEMA.parametrize()
@settings(QUIET, max_examples=12)
def test_what_the_api_page_describes(here: Loop, case: schemathesis.Case, is_real: bool) -> None:
    """Bodies and queries as described, with ids that exist in half of the cases."""
    path = case.path
    arguments = dict(case.path_parameters or {})
    body = case.body if isinstance(case.body, dict | list | str | int | float | type(None)) else {}
    if is_real:
        own = here.owner.objects | {"kind": "weights", "name": "a"}
        arguments |= {name: own[IDS[name]] for name in arguments if name in IDS}
        body = right(here, path.removeprefix("/api/v1/"), body) if isinstance(body, dict) else body
    for key, value in arguments.items():
        path = path.replace(
            "{" + key + "}",
            httpx.URL("http://x").copy_with(path="/" + str(value)).raw_path.decode()[1:] or "x",
        )
    query = {k: v for k, v in (case.query or {}).items() if isinstance(v, str | int | float | bool)}
    answer = here.send(case.method.upper(), f"http://server{path}", params=query, content=_json(body))
    is_taken = answer.status_code < 300
    if is_real and is_taken:
        here.taken.add(case.path.removeprefix("/api/v1/"))
    if answer.status_code == 503 or (is_taken and (path.endswith(ENDS) or case.method.upper() == "DELETE")):
        here.start_anew()


def test_each_route_took_a_body_of_those(here: Loop) -> None:
    """Or they were all refused for something else, and nothing was tried."""
    missing = set(addresses()) - here.taken
    assert len(addresses()) == 18
    assert not missing


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
def test_names_and_paths_cannot_escape(here: Loop, name: str) -> None:
    here.start_anew()
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
    text = unquote(name)
    for kind in ("save_weights", "save_weights_for_sampler", "save_weights_external"):
        for path in (text, f"../{text}"):
            body = {"model_id": own, "seq_id": None, "path": path}
            promised = here.send("POST", f"{API}/{kind}", json=body)
            assert promised.status_code == 200
            told = here.outcome(promised.json()["request_id"])
            if "error" in told:
                assert ("is reserved" if path == ".." else "letters, digits") in told["error"]
            else:
                assert told["path"].endswith(f"/{path}")
    records = here.world.plane._books.checkpoints.of_run(own)
    assert len(records) >= 3, "those that each run is made with, and what may be a name"
    for record in records:
        found = Path(record.directory).resolve()
        assert (found / "manifest.json").exists()
        assert len(found.relative_to(here.root.resolve() / "checkpoints").parts) == 3


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
    here.start_anew()
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
