"""Several groups with one base model: what they are called, and which of them gets what is new.

Knows how busy a driver is. Does not know Ray, or what a run does. A run lives in one group from its creation;
after a restart, when no group has anything of it, it is placed anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from twinkle_serve.config import ModelConfig
from twinkle_serve.control.backend import NotFound
from twinkle_serve.control.books import Books
from twinkle_serve.control.driver import GroupDriver
from twinkle_serve.control.runs import Run
from twinkle_serve.protocol.errors import BackendUnavailable


class Drivers(dict[str, GroupDriver]):
    """Those that are up, by the names of their groups. expected: the base models that are deployed, of which
    some may still be loading."""

    def __init__(self, expected: Iterable[str] = ()) -> None:
        super().__init__()
        self.expected = set(expected)


def group_names(model: ModelConfig) -> list[str]:
    """The first group is called as the model, so a deployment with one group of each has no other names."""
    return [model.name, *(f"{model.name}#{number}" for number in range(2, model.groups + 1))]


def sampling_group_names(model: ModelConfig) -> list[str]:
    """The last ones of them, where no run lives."""
    return group_names(model)[model.groups - model.sampling_groups :]


def groups_of(drivers: Drivers, base_model: str) -> list[GroupDriver]:
    """Raises NotFound, or BackendUnavailable where it is only a matter of time: after a restart a model that
    was added to others loads while they are served again, and its clients must not be sent away."""
    found = [driver for driver in drivers.values() if driver.group.info.name == base_model]
    if not found and base_model in drivers.expected:
        raise BackendUnavailable(f"base model {base_model!r} is being loaded")
    if not found:
        served = ", ".join(dict.fromkeys(driver.group.info.name for driver in drivers.values()))
        raise NotFound(f"base model {base_model!r} is not served here; there is: {served}")
    return found


def homes_of(drivers: Drivers, base_model: str) -> list[GroupDriver]:
    """Those of them in which runs live. Raises as ``groups_of``, and BackendUnavailable if none of these has
    started yet: a model that is added while others are served may get a group that only samples first."""
    found = [driver for driver in groups_of(drivers, base_model) if not driver.samples_only]
    if not found:
        raise BackendUnavailable(f"no group of {base_model} that trains is up yet")
    return found


def driver_of(drivers: Drivers, run: Run) -> GroupDriver | None:
    """The run's own group, or one where it could live. None if its base model is not served (any more)."""
    try:
        return drivers.get(run.group) or homes_of(drivers, run.record.base_model)[0]
    except (NotFound, BackendUnavailable):
        return None


def place_run(books: Books, drivers: Drivers, run: Run) -> None:
    """Give the run a home: of the groups of its base model that are up, the one with the fewest runs that
    somebody is there for. Raises as ``homes_of``."""
    candidates = homes_of(drivers, run.record.base_model)
    if len(candidates) > 1:
        runs = Counter(
            other.home
            for other in books.runs.of_model(run.record.base_model)
            if other is not run and other.wants_adapter and books.sessions.is_active(other.record.session_id)
        )
        candidates.sort(key=lambda driver: (not driver.healthy, runs[driver.name]))
    run.home = candidates[0].name


def place_sample(drivers: Drivers, base_model: str) -> GroupDriver:
    """Where to sample from weights that any group can load: of the groups that only sample, or of all if
    there are none, where least waits. Raises as ``groups_of``."""
    return min(
        groups_of(drivers, base_model),
        key=lambda driver: (driver.lost is not None, not driver.samples_only, driver.num_sequences),
    )
