"""How fast a tenant may use tokens: a bucket that fills by the second and is emptied by work.

Knows one number and the time it is told. Does not know tenants, nor what a token was used for.
"""

from __future__ import annotations


class TokenBucket:
    """Holds at most ``rate`` times ``burst_s`` tokens and starts full.

    Work may begin while anything is in it, and may take more than there is: what is owed is paid back
    before the next work. So no piece of work is too large to be ever done.
    """

    def __init__(self, rate: float, burst_s: float, now: float) -> None:
        self._rate = rate
        self._most = rate * burst_s
        self._level = self._most
        self._as_of = now

    def wait_s(self, now: float) -> float:
        """Seconds until work may begin; 0: at once."""
        self._fill(now)
        return 0.0 if self._level > 0 else (1.0 - self._level) / self._rate

    def take(self, tokens: float, now: float) -> None:
        self._fill(now)
        self._level -= tokens

    def _fill(self, now: float) -> None:
        passed, self._as_of = max(0.0, now - self._as_of), max(now, self._as_of)
        self._level = min(self._most, self._level + passed * self._rate)
