"""Who is at a page: the signed-in caller, whether they operate the service, and whether a form is ours.

Knows cookies and headers. Does not know what a page shows.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import parse_qs, urlsplit

from fastapi import Depends, Request

from twinkle_serve.config import Config, is_loopback
from twinkle_serve.console.sign_in import COOKIE, Seal
from twinkle_serve.gateway.context import Call, admitted
from twinkle_serve.gateway.http import read_body
from twinkle_serve.protocol.errors import Unauthorized, UserError

_MAX_FORM_BYTES = 64 * 1024


class SignInNeeded(Exception):
    """Nobody is signed in, or the key is not valid any more."""


class ForeignForm(Exception):
    """A page of another site tries to do something in the name of whoever is signed in here."""


@dataclass(frozen=True, slots=True)
class Visitor:
    """call: as the SDK's routes get it. key: what was signed in with; it is for nobody's eyes."""

    call: Call
    is_operator: bool
    key: str = field(repr=False)


async def visitor(request: Request) -> AsyncIterator[Visitor]:
    """Raises SignInNeeded."""
    seal: Seal = request.app.state.seal
    key = seal.opened(request.cookies.get(COOKIE))
    if key is None:
        raise SignInNeeded
    admission = admitted(request, {"x-api-key": key})
    try:
        call = await admission.__aenter__()
    except Unauthorized:
        raise SignInNeeded from None
    try:
        yield Visitor(call, is_operator(call.gateway.config, call.name), key)
    finally:
        await admission.__aexit__(None, None, None)


SignedIn = Annotated[Visitor, Depends(visitor)]


def is_operator(config: Config, name: str) -> bool:
    """On one's own machine everybody is; elsewhere those whom the configuration names."""
    if name in config.console.operators:
        return True
    return config.auth.mode == "open" and not config.console.operators and is_loopback(config.http.host)


def check_origin(request: Request) -> None:
    """Raises ForeignForm. Browsers say where a form comes from; the cookie's SameSite is the first lock."""
    site = request.headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        raise ForeignForm
    origin = request.headers.get("origin")
    if origin is not None and _host_of(origin) != request.headers.get("host"):
        raise ForeignForm


def _host_of(origin: str) -> str:
    """Raises ForeignForm for what no browser sends."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        raise ForeignForm from None


async def form_of(request: Request) -> dict[str, str]:
    """The fields of a posted form. Raises ForeignForm, UserError, BodyTooLarge."""
    check_origin(request)
    try:
        text = (await read_body(request, _MAX_FORM_BYTES)).decode()
        fields = parse_qs(text, keep_blank_values=True, strict_parsing=bool(text), max_num_fields=20)
    except (UnicodeDecodeError, ValueError):
        raise UserError("the form cannot be read") from None
    return {name: values[-1] for name, values in fields.items()}


Form = Annotated[dict[str, str], Depends(form_of)]
