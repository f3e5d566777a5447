"""From a template and values to a response, in the visitor's language.

Knows templates, formats and headers. Does not know what a page is about.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import Request
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from starlette.responses import HTMLResponse

from twinkle_serve import __version__
from twinkle_serve.console.texts import LANGUAGES, choose_language, translator

LANGUAGE_COOKIE = "twinkle_language"
STATIC = Path(__file__).parent / "static"
# Nothing comes from elsewhere, nothing inline runs, nobody frames the page.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def number(value: float | None) -> str:
    """1234567 -> 1,234,567; 0.000123 -> 0.000123."""
    if value is None:
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def size(num_bytes: float | None) -> str:
    if num_bytes is None:
        return "–"
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(amount) < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.3g} TB"


def moment(text: str | None) -> str:
    """A time of the wire, to the minute, in UTC: pages know no time zone of the visitor."""
    if text is None:
        return "–"
    return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def make_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("twinkle_serve.console"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, size=size, moment=moment)
    return environment


_environment = make_environment()


def language_of(request: Request) -> str:
    asked = request.query_params.get("language") or request.cookies.get(LANGUAGE_COOKIE)
    return choose_language(asked, request.headers.get("accept-language"))


def page(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """``template`` with ``t`` (words), ``console`` (its address) and ``values``."""
    language = language_of(request)
    shared = {
        "t": translator(language),
        "language": language,
        "languages": LANGUAGES,
        "console": request.scope["root_path"],
        "version": __version__,
        "here": request.url.path,
    }
    html = _environment.get_template(template).render({**shared, **values})
    response = HTMLResponse(html, status, headers=HEADERS)
    if request.query_params.get("language") in LANGUAGES:
        response.set_cookie(LANGUAGE_COOKIE, language, max_age=365 * 86400, httponly=True, samesite="strict")
    return response
