"""A client of a server that dies: as in simulator.py, and it does what makes doing things again differ.

It saves to the same names again and again, loads from names where nothing may be, deletes what it loaded,
sends requests without a seq_id, is born from checkpoints that are replaced meanwhile, and meets failures that
would not come twice. Knows what its run must hold for all that. Does not know what dies when.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

from tests.control.echo_group import pass_command
from tests.control.simulator import RandomRun, Sent
from twinkle_serve.control.backend import NotFound, PassCommand, Poll, SaveCommand
from twinkle_serve.control.codec import decode_command

_NAMES = ("latest", "best")
_GAPS = ("did not arrive within", "too late")
_PARENT = 1000  # added to a run's number


class DurableRun(RandomRun):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.deleted: set[str] = set()
        self.gone: dict[str, int] = {}  # by name: no save up to this seq_id may be listed any more
        self.num_unnumbered = 0
        self.is_stillborn = self.has_meddled = self.is_finished = False
        self.answers: dict[str, Poll] = {}  # to what was asked for before the session was finished

    # birth ----------------------------------------------------------------------------------------

    async def _create(self) -> bool:
        if self.rng.random() < 0.2:
            return await self._create_from_checkpoint()
        self.run_id = await self.client.create(self.number)
        return True

    async def _create_from_checkpoint(self) -> bool:
        """While somebody meddles with it. From the answer on it does not matter what becomes of it."""
        client = self.client
        parent = await client.create(_PARENT + self.number)
        await client.do(parent, 1, pass_command("p"))
        path = (await client.do(parent, 2, SaveCommand("weights", "seed")))["path"]
        meddling = asyncio.create_task(self._meddle(parent, path))
        try:
            request = await client.plane.create_model_from(
                client.tenant, client.session, self.number, path, False, None, {}
            )
            birth = await client.poll(request)
        except NotFound:
            self.is_stillborn = True
            await meddling
            return False
        was_first = not self.has_meddled
        self.run_id = f"{client.session}:train:{self.number}"
        self.is_stillborn = birth.failure is not None
        self.report.counts["births"] += 1
        if self.is_stillborn:
            assert "does not exist" in birth.failure.message, birth
            assert not was_first
        else:
            self.first_seq_id = 2
            self.born = await client.do(self.run_id, 1, pass_command("born", backward=False))
            assert self.born in [("create", "p", "load"), ("create", "p", "q", "load")]
            assert not was_first or len(self.born) == 3
        await meddling
        return not self.is_stillborn

    async def _meddle(self, parent: str, path: str) -> None:
        await asyncio.sleep(self.rng.choice([0, 0.01, 0.1, 1, 10]))
        self.has_meddled = True
        if self.rng.random() < 0.5:
            with suppress(NotFound):
                await self.client.plane.delete_checkpoint(self.client.tenant, path)
        else:
            await self.client.do(parent, 3, pass_command("q"))
            await self.client.do(parent, 4, SaveCommand("weights", "seed", overwrite=True))

    # life -----------------------------------------------------------------------------------------

    def _choose(self, seq_id: int) -> Sent:
        match self.rng.randrange(12):
            case 0:
                return Sent("save", self.rng.choice(_NAMES))
            case 1:
                return Sent("load", self.rng.choice(_NAMES))
            case 2:
                return Sent("pass", f"flaky{self.number}.{seq_id}")
        return super()._choose(seq_id)

    def _command(self, seq_id: int) -> Any:
        sent = self.sent[seq_id]
        if sent.kind == "save" and sent.detail in _NAMES:
            return SaveCommand("weights", sent.detail, overwrite=True)
        return super()._command(seq_id)

    async def _burst(self, seq_ids: list[int]) -> None:
        others = []
        if self.rng.random() < 0.3:
            others.append(self._delete())
        if self.rng.random() < 0.15:
            others.append(self._send_unnumbered())
        await asyncio.gather(super()._burst(seq_ids), *others)

    async def _delete(self) -> None:
        await asyncio.sleep(self.rng.choice([0, 0.01, 0.3, 3.0]))
        saves = [(seq_id, sent) for seq_id, sent in self.sent.items() if sent.kind == "save"]
        done = [sent.detail for _, sent in saves if sent.value]
        if not done:
            return
        name = self.rng.choice(done)
        last = max(seq_id for seq_id, sent in saves if sent.detail == name and sent.value)
        is_sure = all(sent.value or sent.failure for _, sent in saves if sent.detail == name)
        self.deleted.add(name)
        with suppress(NotFound):  # it was, before the server died over it
            await self.client.plane.delete_checkpoint(self.client.tenant, self._path(name))
        if is_sure:
            self.gone[name] = last
        self.report.counts["deleted"] += 1

    async def _send_unnumbered(self) -> None:
        await asyncio.sleep(self.rng.choice([0, 0.001, 0.01, 0.3]))
        self.num_unnumbered += 1
        command = pass_command(f"unnumbered{self.num_unnumbered}")
        await self.client.plane.once("submit", self.client.tenant, self.run_id, None, command)

    async def _sample(self, seq_id: int) -> None:
        # A crash between the two requests may have the first one done already.
        with suppress(NotFound):
            await super()._sample(seq_id)

    async def _check_samples(self) -> None:
        await self._take_in_unnumbered()
        await super()._check_samples()

    async def _take_in_unnumbered(self) -> None:
        """Each took a number, and comes before whatever has a larger one."""
        for entry in self.client.plane.unnumbered(self.run_id):
            command = decode_command(entry.payload)
            assert isinstance(command, PassCommand)
            poll = await self.client.poll(entry.request_id)
            tag, _ = json.loads(command.datums)
            self.sent[entry.seq_id + 0.5] = Sent("pass", tag, poll.value, poll.failure)  # type: ignore[index]
            self.report.counts["unnumbered"] += 1

    def _check_failure(self, seq_id: int, sent: Sent) -> None:
        assert sent.value is not None or sent.failure is not None or sent.lost, "no answer"
        if sent.failure is None or sent.kind in ("bad", "rejected"):
            return
        allowed = [*_GAPS]
        if sent.detail.startswith("flaky"):
            allowed.append("is bad")
        if sent.kind == "save" and sent.detail in self.deleted:
            allowed.append("was deleted but is still being read")
        if sent.kind == "load" and (sent.detail in self.deleted or not self._was_saved(sent.detail, seq_id)):
            allowed.append("does not exist")
        assert any(word in sent.failure.message for word in allowed), sent

    def _was_saved(self, name: str, before: float) -> bool:
        return any(
            sent.kind == "save" and sent.detail == name and sent.value is not None and seq_id < before
            for seq_id, sent in self.sent.items()
        )

    # the end --------------------------------------------------------------------------------------

    async def live(self) -> None:
        await super().live()
        if not self.is_stillborn and self.rng.random() < 0.3:
            await self._finish()

    async def _finish(self) -> None:
        """Leave while something is still to be done, and ask for the answers afterwards."""
        first = int(max(self.sent)) + 1
        requests = {}
        for seq_id in range(first, first + self.rng.randrange(4)):
            self.sent[seq_id] = self._choose(seq_id)
            requests[seq_id] = await self.client.submit(self.run_id, seq_id, self._command(seq_id))
        await asyncio.sleep(self.rng.choice([0, 0, 0.01, 1.0]))
        await self.client.plane.finish_session(self.client.tenant, self.client.session, {})
        for seq_id, request in requests.items():
            poll = await self.client.poll(request)
            assert poll.state == "done", poll
            self.sent[seq_id].value, self.sent[seq_id].failure = poll.value, poll.failure
            self.answers[request] = poll
        self._check_history()
        self.is_finished = True
        self.report.counts["finished"] += 1

    async def _is_gone(self) -> None:
        """Nothing of the session's runs stays but checkpoints and answers."""
        for request, answer in self.answers.items():
            poll = await self.client.poll(request)
            assert poll == answer or poll.state == "gone", (poll, answer)
        for _ in range(100):
            if not (left := self.client.plane.left_of(self.client.session)):
                break
            await asyncio.sleep(5)
        assert not left, left
        await self._check_checkpoints()

    # afterwards -----------------------------------------------------------------------------------

    async def look_again(self) -> None:
        """After one more death of everything the run is still what its client thinks."""
        if not self.run_id:
            return
        if self.is_finished:
            return await self._is_gone()
        last = int(max([self.first_seq_id - 1, *(n for n, sent in self.sent.items() if not sent.lost)]))
        request = await self.client.submit(self.run_id, last + 1, pass_command("look", backward=False))
        poll = await self.client.poll(request)
        if self.is_stillborn:
            allowed = ["no adapter"]
            if self.client.plane.may_be_full:  # such a journal has forgotten why
                allowed.append("lost its adapter")
            assert any(word in poll.failure.message for word in allowed), poll
            return
        history = self._history()
        expected = history[max(history)] if history else self.born
        assert poll.failure is None, poll
        assert poll.value == expected, (self.run_id, poll.value, expected)
        await self._check_checkpoints()

    async def _check_checkpoints(self) -> None:
        listed, _ = await self.client.plane.list_checkpoints(self.client.tenant, self.run_id, None, 0)
        paths = {checkpoint["tinker_path"] for checkpoint in listed}
        saved = [(n, sent.detail) for n, sent in self.sent.items() if sent.kind == "save" and sent.value]
        for name in {name for _, name in saved}:
            if name not in self.deleted:
                assert self._path(name) in paths, f"{name} is not there"
            elif all(n <= self.gone.get(name, -1) for n, each in saved if each == name):
                assert self._path(name) not in paths, f"{name} came back"

    def _path(self, name: str) -> str:
        return f"tinker://{self.run_id}/weights/{name}"


class ShortRun(DurableRun):
    max_bursts = 2
    max_commands = 4
