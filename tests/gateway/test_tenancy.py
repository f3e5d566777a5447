"""What belongs to one tenant does not exist for another: cases made from the route table.

For each route, each path parameter and each field of its body that names an object, a stranger sends a
request in which that one name is the owner's and all others are the stranger's own. The answer must be the
one that a name nobody ever had gets. A new route fails here until each of its names is in the tables below,
and then until it has the check.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.world import API, BASE_URL, Tenant, make_config, world
from twinkle_serve.gateway.app import create_app
from twinkle_serve.protocol import schema
from twinkle_serve.protocol.results import PROTOBUF

# What kind of object a name in a path or a body refers to.
KINDS = {
    "run_id": "run",
    "model_id": "run",
    "session_id": "session",
    "sampler_id": "sampler",
    "sampling_session_id": "sampler",
    "request_id": "promise",
    "path": "checkpoint",
    "model_path": "checkpoint",
    "tinker_path": "checkpoint",
    "source_path": "checkpoint",
    "model": "checkpoint",
}
# Fields that name nothing that anybody owns.
_PLAIN = """
    adam_params age_encryption_recipients base_model cursor custom_loss_seq_id destination_project_id detail
    display_name events forward_backward_input forward_input graph inputs kind limit lora_config metrics
    model_seq_id name num_samples optimizer optimizer_config overwrite owner params project_id project_ids
    reason sampling_params sampling_session_seq_id sdk_version seq_id statuses step tags ttl_seconds type
    user_metadata

    prev_cursor retrieved_request_ids target timeout

    prompt_alt_tokens_k prompt_logprobs prompt_logprobs_last_n target_prompt_logprobs topk_prompt_logprobs
    topk_sample_logprobs

    best_of chat_template_kwargs echo frequency_penalty functions logit_bias logprobs
    max_completion_tokens max_tokens messages n presence_penalty prompt response_format seed stop stream
    stream_options suffix temperature tools top_k top_logprobs top_p
"""
PLAIN = set(_PLAIN.split())
# What bodies need besides, or the API page says in several forms.
UNDESCRIBED: dict[str, dict[str, Any]] = {
    "/api/v1/load_weights": {"model_id": ""},
    "/api/v1/asample": {"sampling_session_id": "", "prompt": {"chunks": []}},
    "/api/v1/telemetry": {"events": []},
    "/api/v1/client/config": {},
    "/api/v1/client/dynamic_config": {},
    "/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}/publish": {},
    "/v1/completions": {"model": "", "prompt": [1], "max_tokens": 1},
    "/v1/chat/completions": {"model": "", "messages": [{"role": "user", "content": "a"}]},
}
# A probe, and links that carry their own proof.
NO_KEY = {
    "/api/v1/healthz",
    "/api/v1/downloads/{run_id}/{kind}/{name}/{file}",
    "/api/v1/sessions/{session_id}/trace",
}
# Routes that answer also when there is no such object, and with what.
ANYWAY = {"/api/v1/cancel_future": 204, "/api/v1/sessions/search": 200}
# A path that SaveWeights and its kin call `path` is a new name in the caller's own run.
NEW_NAMES = re.compile("/save_weights")
# Anything that a route needs besides the names.
FILL = {
    "path": "b",
    "lora_config": {"rank": 8},
    "base_model": "base",
    "model_seq_id": 7,
    "sampling_session_seq_id": 7,
    "seq_id": 5,
    "kind": "weights",
    "name": "a",
    "project_id": "p",
    "custom_loss_seq_id": 0,
    "inputs": [],
    "graph": {},
    "step": 1,
    "metrics": {"reward": 1.0},
    "file": "adapter",
}


@dataclass(frozen=True)
class Case:
    """``where``: "path" or "body"; ``field``: the name that is the owner's."""

    method: str
    route: str
    where: str
    field: str
    body: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.method} {self.route} {self.field}"


def pages() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(method, full path, operation) of every route of the application and of what is mounted in it."""
    app = create_app(lambda: None, make_config(Path("/nowhere")))  # type: ignore[arg-type,return-value]
    mounted = next(route.app for route in app.routes if getattr(route, "path", "") == "/v1")
    for prefix, page in (("", app.openapi()), ("/v1", mounted.openapi())):
        for path, methods in page["paths"].items():
            for method, operation in methods.items():
                yield method.upper(), prefix + path, operation


def body_fields(route: str, operation: Mapping[str, Any]) -> list[str]:
    described = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    properties = described.get("schema", {}).get("properties", {})
    return sorted({*properties, *UNDESCRIBED.get(route, {})})


def cases() -> list[Case]:
    found = []
    for method, route, operation in pages():
        if route in NO_KEY:
            continue
        fields = tuple(body_fields(route, operation))
        for field in re.findall(r"{(\w+)", route):
            if field in ("run_id", "session_id", "sampler_id") or (route, field) == (
                "/v1/models/{name}",
                "name",
            ):
                found.append(Case(method, route, "path", field, fields))
        for field in fields:
            if field in KINDS and not (field == "path" and NEW_NAMES.search(route)):
                found.append(Case(method, route, "body", field, fields))
    return found


def request_of(case: Case, own: Mapping[str, str], foreign: str) -> tuple[str, dict[str, Any]]:
    """URL and body with ``foreign`` in the one place and the caller's own objects everywhere else."""
    path = case.route
    for field in re.findall(r"{(\w+)", case.route):
        value = FILL.get(field, "") if field not in KINDS else own[KINDS[field]]
        if (case.where, case.field) == ("path", field):
            value = foreign
        path = path.replace("{" + field + "}", str(value))
    body = {**{key: FILL[key] for key in case.body if key in FILL}, **UNDESCRIBED.get(case.route, {})}
    for field in case.body:
        if field in KINDS and not (field == "path" and NEW_NAMES.search(case.route)):
            body[field] = own[KINDS[field]]
    if case.where == "body":
        body[case.field] = foreign
    if case.route.endswith("/load_weights") and case.field == "session_id":
        del body["model_id"]
    return BASE_URL + path, body


async def ask(caller: Tenant, case: Case, foreign: str) -> tuple[int, str]:
    url, body = request_of(case, caller.objects, foreign)
    answer = await caller.request(case.method, url, json=body)
    return answer.status_code, answer.text.replace(foreign, "ID")


def test_every_route_and_every_name_is_known() -> None:
    """Fails for a new route: say in the tables above what its names are."""
    routes = list(pages())
    assert len(routes) > 40
    for method, route, operation in routes:
        fields = body_fields(route, operation)
        assert not set(fields) - KINDS.keys() - PLAIN, (method, route, "what do these fields name?")
        known = "requestBody" in operation or route in UNDESCRIBED
        assert method in ("GET", "DELETE") or known, (method, route, "what is in its body?")
        for field in re.findall(r"{(\w+)", route):
            assert field in KINDS or field in ("kind", "name", "file"), (method, route, field)


@pytest.mark.parametrize("case", cases(), ids=str)
async def test_the_names_of_others_are_names_of_nothing(case: Case, tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        owner = await here.tenant("tml-owner").settle()
        stranger = await here.tenant("tml-stranger").settle()
        kind = "checkpoint" if case.field == "name" else KINDS[case.field]
        theirs = owner.objects[kind]
        nothing = theirs.replace("session-", "session-X").replace("train-", "train-X")
        seen, of_nothing = await ask(stranger, case, theirs), await ask(stranger, case, nothing)
        if case.route.endswith("/load_weights") and case.field == "path":
            # Accepted, for its seq_id is spent; what the promise says is tested below.
            assert (seen[0], of_nothing[0]) == (200, 200)
            return
        assert seen == of_nothing, "a stranger can tell that it exists"
        assert seen[0] == ANYWAY.get(case.route, 404)
        # The owner is not hindered: the route answers, or objects to something else.
        status = (await ask(owner, case, theirs))[0]
        assert status in ((200, 204, 302) if case.route.startswith("/api/") else (200, 400))


async def test_nobody_waits_for_the_samples_of_others(tmp_path: Path) -> None:
    """The sampler's name is one level down in ``target``."""
    async with world(tmp_path) as here:
        owner = await here.tenant("tml-owner").settle()
        stranger = await here.tenant("tml-stranger").settle()
        body = {"target": {"sampling_session_id": owner.objects["sampler"]}, "timeout": 0}
        for caller, status in ((stranger, 404), (owner, 200)):
            answer = await caller.request("POST", f"{API}/retrieve_futures", json=body)
            assert answer.status_code == status


async def test_a_pass_in_protobuf_is_for_the_owner_only(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        owner = await here.tenant("tml-owner").settle()
        stranger = await here.tenant("tml-stranger").settle()
        body = schema.ForwardBackwardRequest(model_id=owner.objects["run"], seq_id=5).SerializeToString()
        for caller, status in ((stranger, 404), (owner, 200)):
            answer = await caller.request(
                "POST", f"{API}/forward_backward", content=body, headers={"Content-Type": PROTOBUF}
            )
            assert answer.status_code == status


async def test_loading_a_checkpoint_of_others_fails_as_if_it_were_not_there(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        owner = await here.tenant("tml-owner").settle()
        stranger = await here.tenant("tml-stranger").settle()
        errors = []
        theirs = owner.objects["checkpoint"]
        for seq_id, path in ((5, theirs), (6, theirs.replace("session-", "session-X"))):
            body = {"model_id": stranger.objects["run"], "seq_id": seq_id, "path": path, "optimizer": False}
            promise = (await stranger.post("load_weights", body))["request_id"]
            failed = await stranger.post("retrieve_future", {"request_id": promise})
            errors.append(failed["error"].replace(path, "PATH"))
        assert errors == ["checkpoint 'PATH' does not exist"] * 2


async def test_a_listing_shows_what_is_ones_own(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        owner = await here.tenant("tml-owner").settle()
        newcomer = here.tenant("tml-newcomer")
        for route in ("sessions", "training_runs", "checkpoints"):
            for caller, empty in ((newcomer, True), (owner, False)):
                answer = await caller.request("GET", f"{API}/{route}")
                assert (answer.json()[route] == []) is empty
        assert owner.objects["run"] not in (await newcomer.request("GET", f"{BASE_URL}/v1/models")).text


async def test_what_is_published_can_be_read_until_it_is_not(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        owner = await here.tenant("tml-owner").settle()
        reader = await here.tenant("tml-reader").settle()
        path, run = owner.objects["checkpoint"], owner.objects["run"]
        base = f"{API}/training_runs/{run}/checkpoints/weights/a"

        async def reads() -> set[int]:
            info = await reader.request("POST", f"{API}/weights_info", json={"tinker_path": path})
            number = 10 + len(await listed())
            body = {"session_id": reader.objects["session"], "sampling_session_seq_id": number}
            sampler = await reader.request(
                "POST", f"{API}/create_sampling_session", json=body | {"model_path": path}
            )
            body = {"session_id": reader.objects["session"], "model_seq_id": number, "path": path}
            run = await reader.request("POST", f"{API}/load_weights", json=body)
            links = await reader.request("GET", f"{base}/external_weights_urls")
            return {answer.status_code for answer in (info, sampler, run, links)}

        async def listed() -> list[Any]:
            answer = await reader.request("GET", f"{API}/training_runs")
            return list(answer.json()["training_runs"])

        assert await reads() == {404}
        assert (await reader.request("POST", f"{base}/publish")).status_code == 404
        assert (await owner.request("POST", f"{base}/publish")).status_code == 204
        assert await reads() == {200}
        for method, suffix in (("DELETE", "/publish"), ("DELETE", ""), ("PUT", "/ttl")):
            answer = await reader.request(method, base + suffix, json={"ttl_seconds": 3600})
            assert answer.status_code == 404, "reading is all that a published checkpoint allows"
        assert (await owner.request("DELETE", f"{base}/publish")).status_code == 204
        assert await reads() == {404}


async def test_a_link_stops_working_when_its_checkpoint_is_no_longer_published(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        owner = await here.tenant("tml-owner").settle()
        reader = await here.tenant("tml-reader").settle()
        base = f"{API}/training_runs/{owner.objects['run']}/checkpoints/weights/a"
        await owner.request("POST", f"{base}/publish")
        urls = (await reader.request("GET", f"{base}/external_weights_urls")).json()["urls"]
        link = urls["adapter"]
        assert (await here.http.get(link)).status_code == 200
        await owner.request("DELETE", f"{base}/publish")
        assert (await here.http.get(link)).status_code == 404
