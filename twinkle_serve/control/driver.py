"""The tick loop of one group: plan, run, settle, again.

Knows when to plan and what to do with outcomes, errors and a lost group. Does not know what a command
means (assembly.py) nor who goes first (planner.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from twinkle_serve.config import ModelConfig
from twinkle_serve.control.admission import SampleQueue
from twinkle_serve.control.assembly import Assembler
from twinkle_serve.control.backend import LoadCommand, PassCommand
from twinkle_serve.control.books import Books
from twinkle_serve.control.commands import BirthCommand, RunEntry
from twinkle_serve.control.flights import Assembly, Flight
from twinkle_serve.control.group import Group, GroupLost
from twinkle_serve.control.inflight import InFlight
from twinkle_serve.control.keeper import Keeper
from twinkle_serve.control.planner import Planner, Window
from twinkle_serve.control.quotas import Places, Reason
from twinkle_serve.control.recovery import corrupt
from twinkle_serve.control.residency import Residency
from twinkle_serve.control.runs import Run
from twinkle_serve.control.sharing import DecodeCredit
from twinkle_serve.control.suspects import Suspects
from twinkle_serve.control.telling import GIVEN_UP, note
from twinkle_serve.protocol.work import Failure, Outcome, Progress, Sample, Tick, TickReport

logger = logging.getLogger(__name__)

# Without training in sight decoding may go on for longer at a time, but what arrives meanwhile waits for it.
_IDLE_BUDGET_FACTOR = 4
_MAX_DECODE_BUDGET_S = 0.2
_MIN_DECODE_BUDGET_S = 0.001
_RETRY_S = 5.0
_SAVE_POLL_S = 0.02
_CANCELLED = Failure("cancelled", "user")

Recover = Callable[["GroupDriver", GroupLost], Awaitable[None]]


class GroupDriver:
    """Owns one group's planner, slots and requests in flight. Everything runs on one event loop."""

    def __init__(
        self,
        group: Group,
        books: Books,
        config: ModelConfig,
        weight: Callable[[str], float],
        recover: Recover,
        keeper: Keeper | None = None,
        name: str | None = None,
        samples_only: bool = False,
    ) -> None:
        """name: of the group, where its base model has several. samples_only: no run lives in it."""
        self.group = group
        self.books = books
        self.name = name or group.info.name
        self.samples_only = samples_only
        self.lost: GroupLost | None = None
        self.residency = Residency(group.info.max_slots)
        self.planner = Planner(
            tick_tokens=config.planner.tick_tokens,
            max_runs=group.info.max_slots,
            # In deterministic mode requests share no microbatch, so company would gain nothing.
            company_wait_s=0.0 if config.deterministic else config.planner.company_wait_ms / 1000,
            weight=weight,
            blocked=self._must_wait,
            spend=books.quotas.spend,
        )
        self._assembler = Assembler(
            self.name, books, self.residency, config.microbatch_tokens, config.deterministic, keeper
        )
        self._recover = recover
        self._keeper = keeper
        self._suspects = Suspects()
        self._places: Places = {}  # of the plan that is being made
        self._max_batch = config.sampler.max_batch
        self._queue: SampleQueue[tuple[Sample, Flight]] = SampleQueue(2 * self._max_batch, weight)
        books.watch.add_group(self.name, group.info, config.planner.tick_tokens, config.ranks)
        self._decode_budget_s = config.sampler.decode_budget_ms / 1000
        self._decode_credit = DecodeCredit(config.sampler.share)
        self._flights = InFlight(books, keeper, self._suspects, self.wake)
        if keeper is not None:
            keeper.wakes[self.name] = self.wake
        self._cancels: list[str] = []
        # Each rank has this much for itself, and what is reported is what all have together.
        self._page_bytes = (config.host_page_bytes + config.disk_page_bytes) * config.ranks
        self._reported: Mapping[str, float] = {}
        self._event = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    @property
    def healthy(self) -> bool:
        return self.lost is None and self._task is not None and not self._task.done()

    @property
    def num_sequences(self) -> int:
        """Samples that are decoded or wait for it."""
        return self._flights.num_sequences + len(self._queue)

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._loop())

    async def close(self, timeout_s: float) -> None:
        """Let the tick that runs come to its end, if it does so in time."""
        self._closing = True
        self._event.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=timeout_s)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # what the service asks for --------------------------------------------------------------------

    def ready(self, run: Run) -> None:
        """The run's log has more."""
        self.planner.ready(run.tenant, run.run_id, run.log, self.books.clock.now())
        self._event.set()

    def sample(self, sample: Sample, flight: Flight) -> None:
        # No request counts for more than the half of the room: its last sequence may run for long alone.
        flight = replace(flight, num_sequences=min(flight.num_sequences, self._max_batch))
        self._queue.push(sample.tenant, sample.request_id, flight.num_sequences, (sample, flight))
        self._event.set()

    def cancel(self, tenant: str, request_id: str) -> None:
        """Stop a sample; nothing happens if it is over. What it holds is freed when no rank uses it."""
        self.books.fail(request_id, _CANCELLED)
        waiting = self._queue.remove(tenant, request_id)
        if waiting is not None:
            waiting[1].on_failure(_CANCELLED)
        elif request_id in self._flights:
            self._cancels.append(request_id)
        self._event.set()

    def too_fast(self, tenant: str, request_id: str) -> Reason | None:
        """Why a sample waits that may not be admitted yet for its tenant's rate."""
        return self.books.quotas.too_fast(tenant) if self._queue.has(tenant, request_id) else None

    def wake(self) -> None:
        """Something that is no command needs a tick (a snapshot to drop), or a command may start that had to
        wait."""
        self._event.set()

    def park(self, run: Run) -> None:
        """The run is on disk, and nobody is there for it: free its slot."""
        self._assembler.park(run.run_id)
        self._event.set()

    def end(self, run: Run) -> None:
        """The run was unloaded while nothing was done for it."""
        self.planner.leave(run.run_id)
        self.park(run)

    def lose(self) -> None:
        """Forget what was in the group. Training requests that were in flight stay open, to be done again;
        samples are lost: their clients submit them again."""
        self._give_up_the_guilty()
        self.residency.lose_all()
        self._assembler.lose_all()
        self._cancels.clear()
        self._flights.lose(flight for _, flight in self._queue.drain())

    def _give_up_the_guilty(self) -> None:
        origins = [(request_id, self.books.promises.run_of(request_id)) for request_id in self._flights]
        guilty = self._suspects.died([(request_id, run_id) for request_id, run_id in origins if run_id])
        if guilty is not None and self._keeper is not None:
            logger.error("request %s is given up: the group died each time it was tried", guilty)
            run = self.books.runs.find(self.books.promises.run_of(guilty) or "")
            if self.books.promises.is_pending(guilty):
                note(self._keeper, Outcome(guilty, failure=GIVEN_UP))
            elif run is not None:
                corrupt(self._keeper, run, "the workers died each time they tried to do it again")

    def abandon(self, failure: Failure) -> None:
        """Give up whatever is in flight and all that was in the group: what its loss means until somebody
        replays. Samples are merely lost: their clients submit them again."""
        for run_id in self.residency.lose_all():
            run = self.books.runs.find(run_id)
            if run is not None and run.down is None:
                run.down = failure
        self._assembler.lose_all()
        self.books.samplers.lose_snapshots(self.name)
        self._cancels.clear()
        self._flights.abandon((flight for _, flight in self._queue.drain()), failure)

    # the loop -------------------------------------------------------------------------------------

    async def _loop(self) -> None:
        while not self._closing:
            self._event.clear()
            try:
                if self.lost is not None:
                    await self._rebuild()
                else:
                    await self._step()
            except Exception:
                logger.exception("the tick loop of %s failed; it goes on in %g s", self.name, _RETRY_S)
                await self._pause(_RETRY_S)

    async def _step(self) -> None:
        self._places = {}
        window = self.planner.next(self.books.clock.now())
        while self._suspects.is_trying and self.planner.has_work and window == Window(()):
            self._suspects.forgive()
            window = self.planner.next(self.books.clock.now())
        assembly = Assembly()
        tick = None
        try:
            tick = self._assemble(window, assembly)
            if tick is not None:
                self.books.watch.tick_began(self.name, tick, window)
                if tick.saves and self._keeper is not None:
                    await self._keeper.still_ours()
                await self._run(tick, assembly)
        except Exception:
            logger.exception("a tick of %s failed", self.name)
            if tick is None:
                self._flights.add(assembly.flights)  # nothing of it was sent, so nothing is settled yet
            self._flights.fail(window, assembly)
        finally:
            self.planner.finished(self.books.clock.now())
        if self._keeper is not None:
            self._keeper.ticked(self.name, {})  # one that needed no group, or sent no report, is over too
        self._flights.settle_rest(assembly)
        for request_id in tick.cancels if tick is not None else ():
            self._flights.settle(Outcome(request_id, failure=_CANCELLED))
        self._flights.settle_verdicts(assembly)
        if self.lost is None and not window.work and not self._flights.num_sequences:
            await self._wait(self._next_look(window))

    def _assemble(self, window: Window, assembly: Assembly) -> Tick | None:
        samples = []
        for sample, flight in self._queue.take(self._flights.sequences, self.books.quotas.too_fast):
            self.books.quotas.spend(sample.tenant, sample.request.prompt.size)
            samples.append(sample)
            assembly.flights[flight.request_id] = flight
        self._flights.add(assembly.flights)
        cancels, self._cancels = self._cancels, []
        budget = self._decode_budget(window)
        tick = self._assembler.assemble(assembly, window, samples, cancels, budget, bool(self._flights))
        self._flights.add(assembly.flights)
        return tick

    async def _run(self, tick: Tick, assembly: Assembly) -> None:
        try:
            async for message in self.group.run(tick):
                if isinstance(message, Outcome):
                    self._flights.settle(message)
                elif isinstance(message, Progress):
                    self.books.promises.advance(message.request_id, message.deltas)
                else:
                    self._read(message)
        except GroupLost as lost:
            logger.error("the group of %s is lost: %s", self.name, lost)
            self.lost = lost
            self.books.watch.tick_lost(self.name)
            self._flights.settle_verdicts(assembly)  # they stand, and what was decided is not done again
            await self._recover_for_sure(lost)

    async def _recover_for_sure(self, lost: GroupLost) -> None:
        """Nothing may run on the new group before it is known what the old one had."""
        while not self._closing:
            try:
                return await self._recover(self, lost)
            except Exception:
                logger.exception("recovery of %s failed; it is tried again in %g s", self.name, _RETRY_S)
                await self._pause(_RETRY_S)

    def gauges(self) -> dict[str, float]:
        """What the group held after its last tick, in its own words, and which runs are where."""
        return {
            **self._reported,
            "resident_adapters": self.residency.num_resident,
            "paged_adapters": self.residency.num_paged,
            "requests_in_flight": len(self._flights),
            "runs_waiting": self.planner.num_waiting,
            "samples_waiting": len(self._queue),
        }

    def run_standing(self, run: Run) -> tuple[int, float | None] | None:
        """A waiting run's position, 1 being next, and about how many seconds it has to wait (None: nobody
        knows yet). None if it does not wait for a tick."""
        position = self.planner.position(run.tenant, run.run_id)
        return _standing(position, self.books.watch.seconds_per_run(self.name))

    def sample_standing(self, tenant: str, request_id: str) -> tuple[int, float | None] | None:
        """The same of a sample."""
        position = self._queue.position(tenant, request_id)
        return _standing(position, self.books.watch.seconds_per_sample(self.name))

    def is_working_for(self, run_id: str) -> bool:
        """Whether something of the run is in the tick that runs, or being saved."""
        return self._flights.any_of(run_id)

    def is_full(self) -> bool:
        """Whether the paged adapters have used up their budget, so that a new run has to wait."""
        paged = self._reported.get("paged_host_bytes", 0) + self._reported.get("paged_disk_bytes", 0)
        return paged > self._page_bytes

    def _read(self, report: TickReport) -> None:
        self.books.watch.tick_ended(self.name, report)
        self._decode_credit.tick_ended(report.seconds, still_wanted=report.active_samples > 0)
        if self._keeper is not None:
            self._keeper.ticked(self.name, report.seconds)
        was_full, self._reported = self.is_full(), report.gauges
        if was_full and not self.is_full():
            self._event.set()  # for the runs that wait to be created
        self._flights.heard(report)

    # timing ---------------------------------------------------------------------------------------

    def _decode_budget(self, window: Window) -> float:
        if not self._flights.num_sequences:
            return 0.0
        if window.company_until is not None:
            left = window.company_until - self.books.clock.now()
            return max(_MIN_DECODE_BUDGET_S, min(self._decode_budget_s, left))
        if window.work or self.planner.has_work:
            return max(self._decode_budget_s, self._decode_credit.seconds)
        return max(
            self._decode_budget_s, min(_IDLE_BUDGET_FACTOR * self._decode_budget_s, _MAX_DECODE_BUDGET_S)
        )

    def _next_look(self, window: Window) -> float | None:
        """When to plan again even if nothing comes in."""
        if self._flights:  # saves that are being written come with a later tick
            return self.books.clock.now() + _SAVE_POLL_S
        looks = [window.company_until]
        if self.planner.has_work or not self._queue.is_empty:
            looks.append(self.books.quotas.next_refill())
        return min((look for look in looks if look is not None), default=None)

    async def _wait(self, until: float | None) -> None:
        timer = None
        if until is not None:
            timer = self.books.clock.call_later(max(0.0, until - self.books.clock.now()), self._event.set)
        await self._event.wait()
        if timer is not None:
            timer.cancel()

    async def _pause(self, seconds: float) -> None:
        """Wait, whatever comes in; only closing cuts it short."""
        until = self.books.clock.now() + seconds
        while not self._closing and self.books.clock.now() < until:
            self._event.clear()
            await self._wait(until)

    async def _rebuild(self) -> None:
        await self.group.rebuild()
        self.lost = None
        logger.warning("the group of %s is up again", self.name)

    def _must_wait(self, entry: RunEntry) -> bool:
        """A load waits for a save to the same path that is still being written, what follows a load until a
        snapshot has that, a new run for a place, and what would take its tenant above a limit until it does
        not."""
        if isinstance(entry.command, BirthCommand) and self.is_full():
            return True
        match entry.command:
            case LoadCommand(path=path) | BirthCommand(path=str(path)):
                if self.books.checkpoints.is_saving(path):
                    return True
        run_id = self.books.promises.run_of(entry.request_id)
        if run_id is None:
            return False
        run = self.books.runs.find(run_id)
        assert run is not None
        if self._keeper is not None and self._keeper.is_unsure(run, entry.command):
            return True
        if self._suspects.must_wait(run_id):
            return True
        if self._suspects.is_trying and isinstance(entry.command, PassCommand):
            return False  # it has paid at each death, and a trial without it would end without a verdict
        return self.books.quotas.reason_to_wait(run, entry.command, self._places) is not None


def _standing(position: int | None, seconds_each: float | None) -> tuple[int, float | None] | None:
    if position is None:
        return None
    return position, None if seconds_each is None else position * seconds_each


async def fail_in_flight(driver: GroupDriver, lost: GroupLost) -> None:
    """The plain answer to a lost group: everything that was in it is gone, and says so."""
    driver.abandon(
        Failure(
            "the workers that held this run's adapter died; create a run from one of its checkpoints, "
            "or load one into it",
            "server",
        )
    )
