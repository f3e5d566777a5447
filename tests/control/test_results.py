from __future__ import annotations

from twinkle_serve.control.results import Retention


def retention(**results: int) -> Retention:
    """Settled one second after another, with these sizes."""
    kept = Retention(retention_s=100.0, max_bytes=10)
    for second, (request_id, num_bytes) in enumerate(results.items()):
        kept.settled(request_id, num_bytes, float(second))
    return kept


def test_results_go_when_their_time_is_over_in_the_order_of_settling():
    kept = retention(a=1, b=1, c=1)
    assert kept.expire(99.9) == ([], [])
    assert kept.expire(101.0) == (["a", "b"], [])
    assert kept.num_bytes == 1


def test_nothing_that_was_not_fetched_goes_early():
    kept = retention(a=8, b=8)
    assert kept.is_full
    assert kept.expire(50.0) == ([], [])


def test_of_what_was_fetched_the_oldest_go_until_there_is_room():
    kept = retention(a=4, b=4, c=4, d=4)
    for request_id in ("d", "c", "b"):
        kept.fetched(request_id)
    assert kept.expire(50.0) == ([], ["b", "c"])
    assert (kept.num_bytes, kept.is_full) == (8, False)


def test_what_takes_no_room_makes_none():
    kept = retention(a=0, b=12)
    kept.fetched("a")
    assert kept.expire(50.0) == ([], [])


def test_with_room_what_was_fetched_stays():
    kept = retention(a=4, b=4)
    kept.fetched("a")
    assert kept.expire(50.0) == ([], [])
