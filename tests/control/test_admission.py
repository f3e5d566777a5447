from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve.control.admission import SampleQueue


def queue_of(*samples: tuple[str, str, int], room: int = 4) -> SampleQueue[str]:
    queue: SampleQueue[str] = SampleQueue(room)
    for tenant, request_id, num_sequences in samples:
        queue.push(tenant, request_id, num_sequences, request_id)
    return queue


def admitted(queue: SampleQueue[str], **active: int) -> list[str]:
    return list(queue.take(active))


def test_tenants_take_turns():
    queue = queue_of(*[("heavy", f"h{n}", 1) for n in range(9)], ("light", "l0", 1))
    assert admitted(queue) == ["h0", "l0", "h1", "h2"]
    assert admitted(queue, heavy=3) == ["h3"]
    assert admitted(queue, heavy=4) == []


def test_a_turn_is_not_lost_between_ticks():
    queue = queue_of(("a", "a0", 4), ("a", "a1", 4), ("b", "b0", 4))
    assert admitted(queue) == ["a0", "b0"]
    assert admitted(queue, a=4, b=4) == []
    queue.push("b", "b1", 4, "b1")
    assert admitted(queue) == ["a1", "b1"]
    assert queue.is_empty


def test_one_that_is_larger_than_the_room_keeps_no_other_tenant_out():
    queue = queue_of(("a", "big", 100), ("a", "a1", 1), ("b", "b0", 1))
    assert admitted(queue, a=1, b=4) == []
    assert admitted(queue, b=4) == ["big"]
    assert admitted(queue, a=100, b=4) == []
    assert admitted(queue, a=100) == ["b0"]
    assert admitted(queue, a=100) == []
    assert admitted(queue) == ["a1"]


def test_a_full_room_has_a_share_for_each_by_weight():
    weights = {"a": 1.0, "b": 1.0, "c": 2.0}
    queue: SampleQueue[str] = SampleQueue(8, weights.__getitem__)
    for tenant in weights:
        for n in range(9):
            queue.push(tenant, f"{tenant}{n}", 1, tenant)
    active = Counter(a=8)
    active.update(queue.take(active))
    assert active == Counter(a=8, b=2, c=4)
    active["b"] -= 1
    assert admitted(queue, **active) == ["b"]
    active["b"] += 1
    active["a"] -= 6
    assert admitted(queue, **active) == []  # all have their shares


def test_nobody_slips_past_one_that_waits_for_room():
    queue = queue_of(("a", "a1", 3), ("b", "b1", 1))
    assert admitted(queue, a=1, b=2) == []
    assert admitted(queue, a=1, b=1) == ["b1"]  # its share is two of four
    assert admitted(queue, a=1) == ["a1"]


def test_taking_one_back():
    queue = queue_of(("a", "a0", 1), ("b", "b0", 1))
    assert queue.remove("a", "a0") == "a0"
    assert queue.remove("a", "a0") is None
    assert queue.remove("nobody", "x") is None
    assert admitted(queue) == ["b0"]


def test_draining():
    queue = queue_of(("a", "a0", 1), ("b", "b0", 1))
    assert sorted(queue.drain()) == ["a0", "b0"]
    assert queue.is_empty


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6)), max_size=30))
def test_all_are_admitted_once_in_order_of_their_tenant(samples):
    named = [(tenant, f"{tenant}{n}", size) for n, (tenant, size) in enumerate(samples)]
    queue = queue_of(*named)
    taken = []
    while not queue.is_empty:
        taken += admitted(queue)
    for tenant in "abc":
        own = [request_id for t, request_id, _ in named if t == tenant]
        assert [request_id for request_id in taken if request_id[0] == tenant] == own


def test_positions_are_in_the_order_of_admission():
    samples = [*[("heavy", f"h{n}", 1) for n in range(3)], ("light", "l0", 1), ("light", "l1", 1)]
    queue = queue_of(*samples)
    assert len(queue) == 5
    positions = {request_id: queue.position(tenant, request_id) for tenant, request_id, _ in samples}
    order = []
    while not queue.is_empty:
        order += queue.take({"other": 3})
    assert positions == {request_id: place + 1 for place, request_id in enumerate(order)}
    assert queue.position("heavy", "h0") is None
