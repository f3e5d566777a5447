"""How training and samples share a group's time: the decoding that is owed for time spent on training.

Knows seconds. Does not know what was trained or drawn.
"""

from __future__ import annotations

from collections.abc import Mapping

SAMPLING = "sample"
"""The phase of a tick that is not training's (TickReport.seconds)."""
_MOST_S = 30.0


class DecodeCredit:
    """share: of the time that both take together, decoding's part, below 1.

    Nothing is owed to samples that did not use their time: whoever comes later starts anew.
    """

    def __init__(self, share: float) -> None:
        self._ratio = share / (1 - share)
        self.seconds = 0.0

    def tick_ended(self, seconds: Mapping[str, float], still_wanted: bool) -> None:
        """seconds: by phase. still_wanted: samples are left that would have used more."""
        training = sum(spent for phase, spent in seconds.items() if phase != SAMPLING)
        owed = self.seconds + self._ratio * training - seconds.get(SAMPLING, 0.0)
        self.seconds = min(max(owed, 0.0), _MOST_S) if still_wanted else 0.0
