"""``python -m twinkle_serve.hub.push``: one checkpoint to its owner's own ModelScope repository.

A process of its own for each push, with a home directory of its own, because the hub's client keeps files
and settings there. Gets its order, token included, on standard input, and says how it went in one line of
JSON. Does not know who may publish what (gateway/publishing.py).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Order:
    """files: name to absolute path. name: of the repository, below the token's user. memo: a file that holds
    what was pushed last, and the lock for it; ``content`` tells whether that is this."""

    endpoint: str
    token: str
    name: str
    visibility: str
    files: dict[str, str]
    memo: str
    content: str


def push(order: Order) -> str:
    """The repository that has the files now. Pushes once, however many processes are told to."""
    from modelscope_hub import HubApi

    api = HubApi(endpoint=order.endpoint, token=order.token)
    repository = f"{api.whoami().username}/{order.name}"
    done = json.dumps({"at": order.endpoint, "repository": repository, "content": order.content})
    Path(order.memo).parent.mkdir(parents=True, exist_ok=True)
    with open(order.memo, "a+") as memo:
        fcntl.flock(memo, fcntl.LOCK_EX)
        memo.seek(0)
        is_done = memo.read() == done
        if not api.repo_exists(repository, "model"):  # never made, or deleted by its owner since
            is_done = False
            memo.truncate(0)  # or, should this fail halfway, the next push would take it for done
            api.create_repo(repository, "model", visibility=order.visibility, description="A LoRA adapter")
        if is_done:
            return repository
        # Links, so that what is deleted meanwhile is still pushed whole.
        with tempfile.TemporaryDirectory(dir=Path(order.memo).parent) as staging:
            for name, path in order.files.items():
                os.link(path, Path(staging) / name)
            api.upload_folder(
                repository,
                "model",
                staging,
                commit_message="Push from Twinkle Serve",
                use_cache=False,
                disable_tqdm=True,
            )
        memo.truncate(0)
        memo.write(done)
    return repository


def main() -> int:
    order = Order(**json.load(sys.stdin))
    logging.disable(logging.CRITICAL)  # the client's messages may name what it was given
    out, sys.stdout = sys.stdout, sys.stderr
    answer: dict[str, Any]
    try:
        answer = {"repository": push(order)}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error).replace(order.token, "***")[:500]}
    print(json.dumps(answer), file=out)
    return 0


def as_json(order: Order) -> bytes:
    return json.dumps(asdict(order)).encode()


if __name__ == "__main__":
    sys.exit(main())
