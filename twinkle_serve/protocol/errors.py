"""Everything that can be wrong with a request, and what the tinker SDK does when it is told.

Knows messages, HTTP statuses and categories. Does not know routes or where a check is made.

WireError                            status        what the SDK does with it
├── MalformedBody                    400           BadRequestError at once (a non-empty JSON body is needed)
├── BodyTooLarge                     413           APIStatusError at once
├── Unauthorized                     401           AuthenticationError at once
├── Absent                           404           NotFoundError at once; on a poll ValueError
├── Lost                             410           on a sampling poll: the sample is submitted again
├── Expired                          410           on a heartbeat: stops sending heartbeats
├── Busy                             429           tried again: samples for ever, the rest for five minutes
└── BackendUnavailable               503           retried with backoff for five minutes; a poll says 408

UserError                            200 + future  RequestFailedError(category="user") from the future; never
                                                   retried. The request's seq_id is spent, in its turn.
"""

from __future__ import annotations

from twinkle_serve.protocol.work import Failure

__all__ = [
    "Absent",
    "BackendUnavailable",
    "BodyTooLarge",
    "Busy",
    "Expired",
    "Lost",
    "MalformedBody",
    "Unauthorized",
    "UserError",
    "WireError",
]


RATE, CAPACITY = "paused_rate_limit", "paused_capacity"


class WireError(Exception):
    """Answered at once with ``status`` and ``{"detail": message}``. 402, 409 and 501 are not here: the SDK
    waits or retries on them for minutes, and nothing gets better."""

    status: int


class MalformedBody(WireError):
    """The body cannot be read, or names no run, so no promise can carry the error."""

    status = 400


class BodyTooLarge(WireError):
    """The body, or what it decompresses to, is above the limit that the message names."""

    status = 413


class Unauthorized(WireError):
    """No key, or one that this server does not accept."""

    status = 401


class Absent(WireError):
    """No such object for this caller."""

    status = 404


class Lost(WireError):
    """A sampling promise that this server no longer has."""

    status = 410


class Expired(WireError):
    """A session that is over."""

    status = 410


class Busy(WireError):
    """The caller uses all that it may use at once: not accepted, to be sent again. ``queue_state``: RATE or
    CAPACITY, what the SDK calls the reason for a wait."""

    status = 429

    def __init__(self, message: str, queue_state: str = RATE) -> None:
        super().__init__(message)
        self.queue_state = queue_state


class BackendUnavailable(WireError):
    """The control plane is starting, or starting again."""

    status = 503


class UserError(ValueError):
    """What the caller sent cannot be done; the message names the field and the limit."""

    def as_failure(self) -> Failure:
        return Failure(str(self), "user")
