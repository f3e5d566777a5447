from __future__ import annotations

import pytest

from twinkle_serve.control.rates import TokenBucket


def test_a_full_bucket_lets_work_begin_and_an_empty_one_says_when() -> None:
    bucket = TokenBucket(100, 2, now=0)
    assert bucket.wait_s(0) == 0
    bucket.take(200, 0)
    assert bucket.wait_s(0) == pytest.approx(0.01)
    assert bucket.wait_s(0.02) == 0


def test_work_larger_than_the_bucket_is_done_and_paid_back() -> None:
    bucket = TokenBucket(100, 1, now=0)
    bucket.take(1000, 0)
    assert bucket.wait_s(0) == pytest.approx(9.01)
    assert bucket.wait_s(9.02) == 0


def test_nothing_is_saved_up_beyond_the_burst_and_time_does_not_run_back() -> None:
    bucket = TokenBucket(100, 1, now=0)
    bucket.take(100, 1000)
    assert bucket.wait_s(999) == pytest.approx(0.01)
    assert bucket.wait_s(1000.5) == 0
    bucket.take(50, 1000.5)
    assert bucket.wait_s(1000.5) > 0


def test_over_time_the_rate_is_kept_whatever_the_work() -> None:
    bucket, now, used = TokenBucket(100, 1, now=0), 0.0, 0
    for size in [7, 300, 1, 90] * 50:
        now += bucket.wait_s(now) + 1e-6
        bucket.take(size, now)
        used += size
    assert used / now == pytest.approx(100, rel=0.05)
