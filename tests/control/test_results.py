from __future__ import annotations

from twinkle_serve.control.results import PROMISE_BYTES, Retention

KB = 1024


def retention(
    tenant: str = "alice", max_kb: int = 14, expendable: bool = False, **kilobytes: int
) -> Retention:
    """Settled one second after another, with these sizes, each of which takes a KB more."""
    assert PROMISE_BYTES == KB
    kept = Retention(retention_s=100.0, max_bytes=max_kb * KB)
    for second, (request_id, size) in enumerate(kilobytes.items()):
        kept.settled(request_id, tenant, size * KB, float(second), expendable)
    return kept


def test_results_go_when_their_time_is_over_in_the_order_of_settling():
    kept = retention(a=1, b=1, c=1)
    assert kept.expire(99.9) == ([], [])
    assert kept.expire(101.0) == (["a", "b"], [])
    assert kept.num_bytes == 2 * KB


def test_nothing_that_was_not_fetched_goes_early():
    kept = retention(a=8, b=8)
    assert kept.is_full("alice")
    assert kept.expire(50.0) == ([], [])


def test_of_what_was_fetched_the_oldest_go_until_there_is_room():
    kept = retention(a=4, b=4, c=4, d=4)
    for request_id in ("d", "c", "b"):
        kept.fetched(request_id)
    assert kept.expire(50.0) == ([], ["b", "c"])
    assert (kept.num_bytes, kept.is_full("alice")) == (10 * KB, False)


def test_what_takes_no_room_makes_none():
    kept = retention(a=0, b=14)
    kept.fetched("a")
    assert kept.expire(50.0) == ([], [])


def test_with_room_what_was_fetched_stays():
    kept = retention(a=4, b=4)
    kept.fetched("a")
    assert kept.expire(50.0) == ([], [])


def test_promises_without_a_value_take_room_too():
    kept = retention(**{f"r{i}": 0 for i in range(14)})
    assert not kept.is_full("alice")
    kept.settled("one more", "alice", 0, 50.0)
    assert kept.is_full("alice")


def test_only_who_has_more_than_an_equal_part_is_out_of_room():
    kept = retention(a=8, b=8)
    assert not kept.is_full("bob"), "who has nothing"
    kept.settled("his", "bob", 5 * KB, 2.0)
    assert kept.is_full("alice")
    assert not kept.is_full("bob"), "6 of 14 KB between two"
    kept.settled("his second", "bob", KB, 3.0)
    assert kept.is_full("bob")


def test_of_who_has_no_more_than_an_equal_part_nothing_goes_early():
    kept = retention(a=8, b=8)
    kept.settled("his", "bob", 5 * KB, 2.0, expendable=True)
    kept.fetched("his")
    assert kept.expire(50.0) == ([], [])
    kept.fetched("b")
    assert kept.expire(50.0) == ([], ["b"])


def test_what_would_be_made_again_goes_when_what_was_fetched_is_not_enough():
    kept = retention(a=4, b=4, c=4, d=4, expendable=True)
    kept.fetched("d")
    assert kept.expire(50.0) == ([], ["d", "a"])
    assert not kept.is_full("alice")


def test_who_leaves_no_result_has_no_part_any_more():
    kept = retention(a=6)
    kept.settled("his", "bob", 8 * KB, 200.0)
    assert kept.is_full("bob")
    assert kept.expire(150.0) == (["a"], [])
    assert not kept.is_full("bob")
    kept.settled("more", "bob", 2 * KB, 201.0)
    assert not kept.is_full("bob"), "12 of 14 KB"
