"""ModelScope tokens against a stand-in of its HTTP interface, through its own client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.hub.site import MARKER, Site, running_site
from twinkle_serve.config import ModelScopeConfig
from twinkle_serve.hub.users import HubAway, HubUsers

USERS = {"ms-alice": "alice", "ms-bob": "bob", "ms-nameless": ""}


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    # The operator's own token must never stand in for a caller's.
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-alice")
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client's pauses between its attempts
    with running_site(USERS) as site:
        yield site


def users(site: Site, **fields: Any) -> HubUsers:
    return HubUsers(ModelScopeConfig(endpoint=site.url, **fields))


def test_members_are_those_who_see_the_marker(site: Site) -> None:
    gate = users(site, marker_repo=MARKER)
    assert gate.user_of("ms-alice") == "alice"
    assert gate.user_of("ms-bob") is None
    assert {token for _, token in site.seen} == {"ms-alice", "ms-bob"}


def test_the_list_lets_in_who_is_on_it(site: Site) -> None:
    assert users(site, allow_users=["bob"]).user_of("ms-bob") == "bob"
    assert users(site, allow_users=["bob"]).user_of("ms-alice") is None
    assert users(site, allow_users=["bob"], marker_repo=MARKER).user_of("ms-alice") == "alice"


@pytest.mark.parametrize("token", ["ms-unknown", "ms-nameless"])
def test_nobodys_token_is_refused(site: Site, token: str) -> None:
    assert users(site, allow_users=["", "alice"]).user_of(token) is None
    assert {sent for _, sent in site.seen} == {token}


def test_a_broken_site_is_not_a_verdict(site: Site) -> None:
    site.broken = True
    with pytest.raises(HubAway):
        users(site, allow_users=["alice"]).user_of("ms-alice")
    assert len(site.seen) == 1, "a request waits for this, and other requests come"


def test_a_marker_that_cannot_be_looked_up_is_not_a_verdict(site: Site) -> None:
    """Private ones are found by the older interface only."""
    site.broken_legacy = True
    with pytest.raises(HubAway):
        users(site, marker_repo=MARKER).user_of("ms-bob")
    assert [path.split("/")[1] for path, _ in site.seen] == ["openapi", "openapi", "api"]


def test_a_site_out_of_reach_is_not_a_verdict(site: Site) -> None:
    gate = HubUsers(ModelScopeConfig(endpoint="http://127.0.0.1:9", allow_users=["alice"]))
    with pytest.raises(HubAway):
        gate.user_of("ms-alice")
