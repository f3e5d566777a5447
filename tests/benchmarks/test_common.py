from benchmarks.common import interleave


def test_arms_take_turns_there_and_back() -> None:
    calls: list[str] = []
    times = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert set(times) == {"a", "b"}


def test_an_arm_settles_before_each_time() -> None:
    calls: list[str] = []
    interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 1, warmup=0, settle=True)
    assert calls == ["a", "a", "b", "b"]


def test_short_arms_go_on_until_their_seconds_are_over() -> None:
    calls: list[None] = []
    interleave({"a": lambda: calls.append(None)}, rounds=1, warmup=0, seconds=0.05)
    assert len(calls) > 1
