"""What was deployed, and whether a running coordinator can go on under it.

Knows configurations. Does not know Ray. A change that only adds (base models, or groups of one) leaves alone
what runs; every other change of what the coordinator does needs a new one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from twinkle_serve import __version__
from twinkle_serve.config import Config


@dataclass(frozen=True, slots=True)
class Deployment:
    """deployed_at: POSIX seconds; of two deployments the newer one counts. version: of this package."""

    config: Config
    deployed_at: float = field(default_factory=time.time)
    version: str = __version__

    def grows_to(self, other: Deployment) -> bool:
        """Whether ``other`` has everything that this one has, unchanged, and maybe more models or groups."""
        before, after = _relevant(self.config), _relevant(other.config)
        models = {model["name"]: model for model in after.pop("models")}
        for model in before.pop("models"):
            found = models.get(model["name"], {"groups": 0})
            missing = model.pop("groups") - found.pop("groups")
            # The last groups are those that only sample: with one more, one of them would have to train.
            if missing > 0 or (missing < 0 and model["sampling_groups"]) or found != model:
                return False
        return self.version == other.version and before == after


def _relevant(config: Config) -> dict[str, Any]:
    whole = dict.fromkeys(("models", "storage", "limits", "losses", "monitoring"), True)
    return config.model_dump(include=whole | {"auth": {"mode"}})
