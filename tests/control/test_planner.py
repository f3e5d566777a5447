from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.control.echo_group import pass_command
from tests.control.plane import optim
from twinkle_serve.control import planner
from twinkle_serve.control.backend import SaveCommand, UnloadCommand
from twinkle_serve.control.commands import num_tokens
from twinkle_serve.control.log import CommandLog
from twinkle_serve.control.planner import Planner


class Bench:
    """A planner with logs to fill; run ids are "tenant/number"."""

    def __init__(self, tick_tokens: int = 100, max_runs: int = 8, wait_s: float = 0.0, **options) -> None:
        self.planner = Planner(tick_tokens=tick_tokens, max_runs=max_runs, company_wait_s=wait_s, **options)
        self.logs: dict[str, CommandLog] = {}
        self.now = 0.0

    def send(self, run_id: str, *commands) -> None:
        log = self.logs.setdefault(run_id, CommandLog(1e9))
        for command in commands:
            log.append(None, f"{run_id}#{id(command)}", command, self.now)
        self.planner.ready(run_id.split("/")[0], run_id, log, self.now)

    def tick(self, seconds: float = 0.1):
        """Plan and run one tick: what was in it, by run."""
        window = self.planner.next(self.now)
        if window.work:
            self.now += seconds
        self.planner.finished(self.now)
        return {work.run_id: [entry.command for entry in work.entries] for work in window.work}

    def until(self) -> float | None:
        """Until when passes wait for company; takes nothing unless something need not wait."""
        window = self.planner.next(self.now)
        self.planner.finished(self.now)
        return window.company_until


def tokens(tick) -> Counter:
    """Tokens by tenant."""
    count: Counter = Counter()
    for run_id, commands in tick.items():
        count[run_id.split("/")[0]] += sum(num_tokens(command) for command in commands)
    return count


def step(size: int = 10):
    return pass_command("p", size), optim()


# what a tick holds ------------------------------------------------------------------------------------


def test_nothing_to_do():
    bench = Bench()
    assert bench.tick() == {}
    assert not bench.planner.has_work


def test_passes_of_all_tenants_and_their_optimizer_steps_share_a_tick():
    bench = Bench()
    bench.send("a/0", *step())
    bench.send("b/0", *step())
    tick = bench.tick()
    assert {run: len(commands) for run, commands in tick.items()} == {"a/0": 2, "b/0": 2}
    assert not bench.planner.has_work


def test_a_run_goes_on_after_its_barrier_in_the_next_tick():
    bench = Bench()
    first, second = step(), step()
    bench.send("a/0", *first, *second)
    assert bench.tick()["a/0"] == [*first]
    assert bench.tick()["a/0"] == [*second]


def test_a_run_in_flight_is_not_planned_again_until_the_tick_is_over():
    bench = Bench()
    bench.send("a/0", *step())
    window = bench.planner.next(0.0)
    bench.send("a/0", *step())
    assert len(window.work) == 1
    assert not bench.planner.has_work
    bench.planner.finished(0.1)
    assert bench.planner.has_work


def test_what_does_not_fit_waits_whole_for_the_next_tick():
    bench = Bench(tick_tokens=100)
    bench.send("a/0", pass_command("p", 60), pass_command("q", 60), optim())
    assert len(bench.tick()["a/0"]) == 1
    assert len(bench.tick()["a/0"]) == 2


def test_a_request_above_the_budget_goes_alone():
    bench = Bench(tick_tokens=100)
    bench.send("a/0", pass_command("huge", 1000))
    bench.send("b/0", pass_command("small", 10))
    ticks = [bench.tick(), bench.tick()]
    assert sorted(len(tick) for tick in ticks) == [1, 1]
    assert tokens(ticks[0]) + tokens(ticks[1]) == {"a": 1000, "b": 10}


def costly(tag: str):
    """Few tokens and a loss that takes as long as 80."""
    return replace(pass_command(tag, 5), loss_tokens=80)


def test_passes_with_costly_losses_do_not_share_a_tick_however_few_their_tokens_are():
    spent: list[int] = []
    bench = Bench(tick_tokens=100, spend=lambda tenant, tokens: spent.append(tokens))
    bench.send("a/0", costly("p"), costly("q"), optim())
    assert [len(bench.tick()["a/0"]) for _ in range(2)] == [1, 2]
    assert spent == [5, 5, 0]  # rates and bills are in tokens of datums


def test_a_costly_loss_is_paid_for_by_its_tenant():
    bench = Bench(tick_tokens=100)
    bench.send("a/0", *(costly(f"p{i}") for i in range(20)))
    bench.send("b/0", *(pass_command(f"q{i}", 20) for i in range(20)))
    count = Counter(run for _ in range(5) for run, commands in bench.tick().items() for _ in commands)
    assert count["b/0"] >= 3 * count["a/0"]


def test_barriers_join_a_tick_whose_budget_is_spent():
    bench = Bench(tick_tokens=100)
    bench.send("a/0", pass_command("p", 100))
    bench.send("b/0", optim())
    bench.send("c/0", pass_command("p", 100))
    bench.send("c/1", SaveCommand("weights", "n"))
    assert bench.tick().keys() == {"a/0", "b/0", "c/1"}


def test_a_blocked_command_holds_up_its_own_run_only():
    blocked = [True]
    save = SaveCommand("weights", "n")
    bench = Bench(blocked=lambda entry: entry.command is save and blocked[0])
    bench.send("a/0", optim(), save, optim())
    bench.send("a/1", optim())
    assert {run: len(c) for run, c in bench.tick().items()} == {"a/0": 1, "a/1": 1}
    assert bench.tick() == {}
    blocked[0] = False
    assert bench.tick()["a/0"] == [save]


# fairness ---------------------------------------------------------------------------------------------


def test_a_lone_tenant_gets_the_whole_tick():
    bench = Bench(tick_tokens=100)
    bench.send("a/0", *[pass_command("p", 10) for _ in range(30)])
    assert [tokens(bench.tick())["a"] for _ in range(3)] == [100, 100, 100]


def test_a_heavy_tenant_cannot_starve_a_light_one():
    bench = Bench(tick_tokens=100)
    for run in range(8):
        bench.send(f"heavy/{run}", *[pass_command("p", 50) for _ in range(100)])
    for _ in range(5):
        bench.tick()
    bench.send("light/0", pass_command("p", 10))
    assert tokens(bench.tick())["light"] == 10


def test_many_runs_are_worth_no_more_than_one():
    bench = Bench(tick_tokens=100, max_runs=64)
    for run in range(20):
        bench.send(f"many/{run}", *[pass_command("p", 10) for _ in range(20)])
    bench.send("one/0", *[pass_command("p", 10) for _ in range(100)])
    total: Counter = Counter()
    for _ in range(10):
        total += tokens(bench.tick())
    assert total == {"many": 500, "one": 500}


def test_shares_follow_the_weights():
    bench = Bench(tick_tokens=90, weight=lambda tenant: {"gold": 2.0, "plain": 1.0}[tenant])
    for tenant in ("gold", "plain"):
        bench.send(f"{tenant}/0", *[pass_command("p", 10) for _ in range(200)])
    total: Counter = Counter()
    for _ in range(10):
        total += tokens(bench.tick())
    assert total == {"gold": 600, "plain": 300}


def test_idle_time_saves_up_no_more_than_one_tick():
    bench = Bench(tick_tokens=100)
    bench.send("late/0", pass_command("p", 10))
    bench.send("busy/0", *[pass_command("p", 10) for _ in range(200)])
    for _ in range(5):
        bench.tick()
    bench.send("late/0", *[pass_command("p", 10) for _ in range(200)])
    total: Counter = Counter()
    for _ in range(5):
        total += tokens(bench.tick())
    assert 250 <= total["late"] <= 300


def test_a_large_request_is_not_overtaken_for_ever():
    bench = Bench(tick_tokens=100)
    for _ in range(50):
        bench.send("small/0", pass_command("p", 30))
    bench.send("large/0", pass_command("p", 95))
    assert any("large/0" in bench.tick() for _ in range(3))


def test_more_runs_than_slots_take_turns():
    bench = Bench(max_runs=2)
    for run in range(6):
        bench.send(f"a/{run}", optim(), optim())
    ticks = [list(bench.tick()) for _ in range(6)]
    assert all(len(tick) == 2 for tick in ticks)
    assert sorted(run for tick in ticks[:3] for run in tick) == [f"a/{n}" for n in range(6)]


def test_a_tenant_with_many_runs_does_not_keep_the_slots():
    bench = Bench(max_runs=2, tick_tokens=1000)
    for run in range(20):
        bench.send(f"many/{run}", *[optim() for _ in range(10)])
    bench.send("one/0", *[pass_command("p", 100) for _ in range(10)], optim(), *step(100))
    served = [bench.tick() for _ in range(6)]
    assert sum("one/0" in tick for tick in served) >= 2


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 140)), min_size=1, max_size=80),
    st.integers(1, 4),
)
def test_every_command_runs_once_in_the_order_of_its_run(sent, max_runs):
    bench = Bench(tick_tokens=100, max_runs=max_runs)
    expected: dict[str, list] = {}
    for tenant, run, size in sent:
        run_id = f"t{tenant}/{run}"
        command = pass_command("p", size) if size else optim()
        expected.setdefault(run_id, []).append(command)
        bench.send(run_id, command)
    done: dict[str, list] = {}
    while bench.planner.has_work:
        tick = bench.tick()
        assert 0 < len(tick) <= max_runs
        costs = [num_tokens(command) for commands in tick.values() for command in commands]
        assert sum(costs) <= 100 or len([c for c in costs if c]) == 1
        for run_id, commands in tick.items():
            done.setdefault(run_id, []).extend(commands)
    assert {run: [id(c) for c in cs] for run, cs in done.items()} == {
        run: [id(c) for c in cs] for run, cs in expected.items()
    }


@settings(deadline=None, max_examples=50)
@given(
    # Sizes that fill a tick: what a larger request cannot use of one goes to others, whatever their share.
    st.lists(
        st.tuples(st.sampled_from([1, 5, 10, 25, 50, 100]), st.floats(0.5, 4.0)), min_size=2, max_size=5
    ),
    st.integers(20, 60),
)
def test_backlogged_tenants_get_tokens_by_weight(tenants, num_ticks):
    weights = {f"t{n}": weight for n, (_, weight) in enumerate(tenants)}
    bench = Bench(tick_tokens=100, weight=weights.__getitem__)
    for n, (size, _) in enumerate(tenants):
        bench.send(f"t{n}/0", *[pass_command("p", size) for _ in range(100 * num_ticks // size + 2)])
    total: Counter = Counter()
    for _ in range(num_ticks):
        total += tokens(bench.tick())
    shares = [total[tenant] / weight for tenant, weight in weights.items()]
    # Two accounts that are served in turn differ by what one tick can do for one of them at most.
    assert max(shares) - min(shares) <= 2 * 100 / min(weights.values())


def test_planning_does_not_depend_on_the_length_of_the_backlog():
    calls = Counter()

    def blocked(entry) -> bool:
        calls["looked at"] += 1
        return False

    bench = Bench(tick_tokens=100, blocked=blocked)
    for tenant in range(4):
        bench.send(f"t{tenant}/0", *[pass_command("p", 10) for _ in range(5000)])
    bench.tick()
    assert calls["looked at"] < 50


# company ----------------------------------------------------------------------------------------------


def in_step(*runs: str, **options) -> Bench:
    """A bench whose runs have just been in a pass of 100 ms together."""
    bench = Bench(wait_s=0.025, **options)
    for run in runs:
        bench.send(run, *step())
    assert bench.tick(0.1).keys() == set(runs)
    return bench


def test_a_lone_run_never_waits():
    bench = in_step("a/0")
    bench.send("a/0", *step())
    assert bench.until() is None


def test_a_pass_waits_for_a_run_that_was_in_step():
    bench = in_step("a/0", "b/0")
    bench.now += 0.002
    bench.send("a/0", *step())
    assert bench.until() == bench.now + 0.025
    bench.now += 0.010
    bench.send("b/0", *step())
    assert bench.tick().keys() == {"a/0", "b/0"}


def test_waiting_ends_and_who_did_not_come_is_not_waited_for_again():
    bench = in_step("a/0", "b/0")
    bench.send("a/0", *step())
    until = bench.until()
    bench.now = until - 0.001
    assert bench.until() == until
    bench.now = until
    assert bench.tick().keys() == {"a/0"}
    bench.send("a/0", *step())
    assert bench.until() is None


def test_waiting_is_no_longer_than_half_a_pass():
    bench = Bench(wait_s=0.025)
    bench.send("a/0", *step())
    bench.send("b/0", *step())
    bench.tick(0.010)
    bench.send("a/0", *step())
    assert bench.until() == bench.now + 0.005


def test_optimizer_steps_and_saves_do_not_wait():
    bench = Bench(wait_s=0.025)
    bench.send("a/0", pass_command("p", 10))
    bench.send("b/0", pass_command("p", 10))
    bench.send("c/0", pass_command("p", 10))
    bench.tick(0.1)
    bench.send("a/0", pass_command("p", 10))
    bench.send("b/0", optim(), pass_command("p", 10))
    window = bench.planner.next(bench.now)
    assert window.company_until is not None
    assert [(work.run_id, len(work.entries)) for work in window.work] == [("b/0", 1)]


def test_a_full_tick_does_not_wait():
    bench = in_step("a/0", "b/0", tick_tokens=100)
    bench.send("a/0", pass_command("p", 100))
    assert bench.until() is None


def test_nobody_waits_for_a_client_that_usually_takes_long():
    bench = in_step("a/0", "slow/0")
    for _ in range(3):
        bench.now += 2.0
        bench.send("slow/0", *step())
        bench.send("a/0", *step())
        assert bench.tick(0.1).keys() == {"a/0", "slow/0"}
    bench.send("a/0", *step())
    assert bench.until() is None


def test_time_that_the_server_took_does_not_make_a_client_slow():
    bench = in_step("a/0", "b/0")
    for _ in range(5):
        for run in ("a/0", "b/0"):
            bench.now += 0.002
            bench.send(run, pass_command("p", 10))
        bench.tick(3.0)
        bench.now += 0.002
        bench.send("a/0", optim())
        bench.send("b/0", optim())
        bench.tick(3.0)
    bench.send("a/0", pass_command("p", 10))
    assert bench.until() is not None


def test_nobody_waits_for_a_run_that_was_unloaded():
    bench = in_step("a/0", "b/0")
    bench.send("b/0", UnloadCommand())
    bench.send("a/0", *step())
    bench.tick()
    assert bench.until() is None
    assert "a/0" not in bench.tick()


def test_positions_are_in_the_order_of_the_coming_turns() -> None:
    planner, logs = Planner(tick_tokens=10, max_runs=8, company_wait_s=0.0), {}
    for tenant, run_id in [("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1")]:
        logs[run_id] = log = CommandLog(300.0)
        log.append(1, run_id, pass_command("p", 10), 0.0)
        planner.ready(tenant, run_id, log, 0.0)
    assert planner.num_waiting == 4
    expected = {run_id: planner.position(run_id[0], run_id) for run_id in logs}
    served = []
    while planner.has_work:
        served += [work.run_id for work in planner.next(0.0).work]
        planner.finished(0.0)
    assert expected == {run_id: place + 1 for place, run_id in enumerate(served)}
    assert planner.position("a", "a1") is None


# a long queue -----------------------------------------------------------------------------------------


def test_planning_looks_at_few_of_many_waiting_runs(monkeypatch):
    looks = Counter()
    monkeypatch.setattr(planner, "num_tokens", lambda command: looks.update(["look"]) or num_tokens(command))
    bench = Bench(tick_tokens=100, max_runs=4)
    for number in range(5_000):
        bench.send(f"tenant{number % 500}/{number}", *step(30))
    ticks = [bench.tick() for _ in range(20)]
    assert all(sum(tokens(tick).values()) == 90 for tick in ticks)
    assert looks["look"] <= 20 * 100
    assert len(bench.planner._heap) <= 600


def test_the_search_goes_on_while_nothing_is_found():
    bench = Bench(
        blocked=lambda entry: entry.command.datums != b"fine" and "late" not in str(entry.request_id)
    )
    for number in range(300):
        bench.send(f"stuck{number}/run", pass_command("p"))
    bench.send("zzz/late", pass_command("p"))
    assert list(bench.tick()) == ["zzz/late"]


def test_who_is_behind_many_that_do_not_fit_has_its_turn_all_the_same():
    bench = Bench(tick_tokens=100, max_runs=8)
    for number in range(300):
        bench.send(f"a{number:03}/run", pass_command("p", 60), optim())
    bench.send("zzz/run", optim())
    order = [run_id for _ in range(301) for run_id in bench.tick()]
    assert len(order) == 301
    assert "zzz/run" in order


def test_a_tenant_that_comes_back_many_times_leaves_nothing_behind():
    bench = Bench(tick_tokens=1000)
    for _ in range(500):
        bench.send("alice/run", *step())
        bench.send("bob/run", *step())
        assert tokens(bench.tick()) == {"alice": 10, "bob": 10}
    assert len(bench.planner._heap) <= 4
