"""Logs of the service's own loggers: JSON lines in one file, or text on stderr.

Knows formats, and which fields a record may carry: ``tenant`` (a hash), ``run``, ``seq``, ``request``. Does
not know what is logged; keys of users are never given to a logger.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler

from twinkle_serve.config import MonitoringConfig

ROOT = "twinkle_serve"
FIELDS = ("tenant", "run", "seq", "request", "route", "status", "seconds")


class JsonLines(logging.Formatter):
    """One object a record: time, level, component, logger, message, and the fields that it carries."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "component": self._component,
            "pid": os.getpid(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in FIELDS:
            value = getattr(record, name, None)
            if value is not None:
                line[name] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure_logs(config: MonitoringConfig, component: str) -> None:
    """Set up the loggers of this process, once; ``component`` says which part of the service it is.

    A log file is opened for appending and reopened when it was moved away, so that it can be rotated. One
    write a line keeps the lines of several processes whole.
    """
    root = logging.getLogger(ROOT)
    root.setLevel(config.log_level)
    for old in [handler for handler in root.handlers if getattr(handler, "is_ours", False)]:
        root.removeHandler(old)
        old.close()
    handler: logging.Handler
    if config.log_file is None:
        handler = logging.StreamHandler()
        said = component.replace("%", "%%")  # it has the name of a model in it
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {said}: %(message)s"))
    else:
        config.log_file.parent.mkdir(parents=True, exist_ok=True)
        handler = WatchedFileHandler(config.log_file, encoding="utf-8")
        handler.setFormatter(JsonLines(component))
    handler.is_ours = True  # type: ignore[union-attr]
    root.addHandler(handler)
