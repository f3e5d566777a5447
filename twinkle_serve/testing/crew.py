"""A few ranks in processes of their own, without Ray: for tests and benchmarks of what ranks do together.

Each process joins one gloo group and then does what it is told, until the crew is dismissed. Knows processes
and pipes; what is told is any function that can be pickled.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from twinkle_serve.engine.sharding.place import RankPlace
from twinkle_serve.testing.server import free_port

TIMEOUT_S = 60.0


class CrewError(Exception):
    """A rank raised or died; the message has every rank's traceback."""


class Crew:
    """``size`` ranks. Use ``crew`` to start and end them."""

    def __init__(self, size: int, timeout_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        address = f"tcp://127.0.0.1:{free_port()}"
        self.places = [RankPlace(rank, size, address, timeout_s) for rank in range(size)]
        self._pipes: list[Connection] = []
        self._processes = []
        for place in self.places:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(place, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, task: Callable[..., Any], *arguments: Any, deadline_s: float = 240.0) -> list[Any]:
        """What ``task(place, *arguments)`` returns on each rank. Raises CrewError."""
        return self.run_each(task, [arguments] * len(self._pipes), deadline_s=deadline_s)

    def run_each(
        self, task: Callable[..., Any], arguments: Sequence[Sequence[Any]], *, deadline_s: float = 240.0
    ) -> list[Any]:
        """The same with arguments of its own for each rank."""
        for pipe, own in zip(self._pipes, arguments, strict=True):
            pipe.send((task, tuple(own)))
        answers = [self._answer(rank, deadline_s) for rank in range(len(self._pipes))]
        errors = [f"rank {rank}: {text}" for rank, (fine, text) in enumerate(answers) if not fine]
        if errors:
            raise CrewError("\n".join(errors))
        return [value for _, value in answers]

    def _answer(self, rank: int, deadline_s: float) -> tuple[bool, Any]:
        pipe = self._pipes[rank]
        try:
            if not pipe.poll(deadline_s):
                return False, f"no answer in {deadline_s:g} s"
            answer: tuple[bool, Any] = pipe.recv()
            return answer
        except EOFError:
            return False, "died"

    def dismiss(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def crew(size: int, timeout_s: float = TIMEOUT_S) -> Iterator[Crew]:
    """``size`` ranks until the block ends. timeout_s: of each of their collectives."""
    ranks = Crew(size, timeout_s)
    try:
        yield ranks
    finally:
        ranks.dismiss()


def _serve(place: RankPlace, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    while True:
        try:
            task, arguments = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)  # an ordinary exit would wait for peers that are leaving as well
        try:
            answer = (True, task(place, *arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
