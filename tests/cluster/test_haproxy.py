"""What Serve writes for HAProxy is mended: no port but the service's, and no final answer before there is an
application. The text is that of the installed Serve; what the whole does is in tests/e2e/test_haproxy.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from twinkle_serve.cluster.haproxy import mended


@pytest.fixture(scope="module")
def written() -> str:
    """A configuration by Serve's own template, without an application."""
    from jinja2 import Environment
    from ray.serve._private.haproxy import HAProxyConfig
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    language = Environment()
    language.filters["haproxy_fmt"] = str
    template = language.from_string(HAPROXY_CONFIG_TEMPLATE)
    return str(template.render(config=HAProxyConfig(), route_info={})) + "\n"


def binds(text: str) -> list[str]:
    return [line.split()[1] for line in text.splitlines() if line.strip().startswith("bind ")]


def test_only_the_service_listens(written: str) -> None:
    assert len(binds(written)) == 3
    (own,) = binds(mended(written))
    assert own.endswith(":8000")


def test_no_application_is_no_404(written: str) -> None:
    assert "status 404" in written
    assert "status 404" not in mended(written)


def test_a_file_that_was_mended_stays_as_it_is(written: str) -> None:
    assert mended(mended(written)) == mended(written)


def test_an_unknown_file_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown way"):
        mended("global\n    maxconn 10\n")


def test_the_program_mends_the_file_and_becomes_haproxy(written: str, tmp_path: Path) -> None:
    file = tmp_path / "haproxy.cfg"
    file.write_text(written)
    program = str(Path(sys.executable).with_name("twinkle-haproxy"))
    as_in_serve = os.environ | {"RAY_SERVE_HAPROXY_BINARY_PATH": program}
    done = subprocess.run(
        [program, "-v", "-f", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=as_in_serve,
    )
    assert done.stdout.startswith("HAProxy version")
    assert file.read_text() == mended(written)
