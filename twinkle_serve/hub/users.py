"""Who a ModelScope token belongs to, and whether that user may come in.

Knows ModelScope's API by its own client, used without any state of this machine. Does not know HTTP headers
or how long an answer may be remembered (gateway/identity.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twinkle_serve.config import ModelScopeConfig

# To connect and to answer, each; a good answer takes a third of a second.
_TIMEOUT_S = 5


class HubAway(Exception):
    """ModelScope could not be asked; nothing is known about the token."""


class HubUsers:
    """Users of one ModelScope site. ``open_api``: (endpoint, token) -> a modelscope_hub.HubApi."""

    def __init__(self, config: ModelScopeConfig, open_api: Callable[[str, str], Any] | None = None) -> None:
        self._config = config
        self._open_api = open_api or _hub_api

    def user_of(self, token: str) -> str | None:
        """The user's name, or None if the token is not valid or its user is not a member. Blocks.

        Raises HubAway when ModelScope does not answer.
        """
        from modelscope_hub import errors

        assert token, "an empty token would make the client fall back to the server's own"
        api = self._open_api(self._config.endpoint, token)
        try:
            user = str(api.whoami().username or "")
            return user if user and self._is_member(api, user) else None
        except (errors.AuthenticationError, errors.PermissionDeniedError):
            return None
        except errors.HubError as error:
            raise HubAway(type(error).__name__) from None

    def _is_member(self, api: Any, user: str) -> bool:
        """On the list, or able to see the repository that only the organisation's members see."""
        if user in self._config.allow_users:
            return True
        marker = self._config.marker_repo
        return marker is not None and bool(api.repo_exists(marker, "model"))


def _hub_api(endpoint: str, token: str) -> Any:
    """With clients that ask once and give up soon: left alone they try five times, a minute each, and sleep
    as long as the site says, while a request waits to be let in."""
    # Imported here: only servers with auth.mode modelscope pay for it.
    from modelscope_hub import HubApi
    from modelscope_hub._legacy_api import LegacyClient
    from modelscope_hub._openapi import OpenAPIClient

    api = HubApi(endpoint=endpoint, token=token)
    api._openapi = OpenAPIClient(api._config, timeout=_TIMEOUT_S, max_retries=1)
    api._legacy = LegacyClient(token=token, endpoint=api._config.endpoint, timeout=_TIMEOUT_S, max_retries=0)
    return api
