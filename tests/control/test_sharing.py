"""How a group's time is shared between training and samples."""

from __future__ import annotations

import asyncio

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.plane import TENANT, Client, control_plane, make_config, optim
from tests.control.virtual_time import virtual
from twinkle_serve.control.sharing import DecodeCredit


def test_decoding_is_owed_its_share_of_the_time_that_both_took() -> None:
    credit = DecodeCredit(0.75)
    credit.tick_ended({"passes": 1.0, "optim": 0.5, "move": 0.5, "sample": 1.0}, still_wanted=True)
    assert credit.seconds == pytest.approx(3 * 2.0 - 1.0)
    credit.tick_ended({"sample": 4.0}, still_wanted=True)
    assert credit.seconds == pytest.approx(1.0)
    credit.tick_ended({"sample": 4.0}, still_wanted=True)
    assert credit.seconds == 0.0


def test_samples_that_wanted_no_more_are_owed_nothing() -> None:
    credit = DecodeCredit(0.5)
    credit.tick_ended({"passes": 5.0}, still_wanted=True)
    credit.tick_ended({"passes": 5.0, "sample": 1.0}, still_wanted=False)
    assert credit.seconds == 0.0


def test_what_is_owed_has_an_end() -> None:
    credit = DecodeCredit(0.5)
    for _ in range(1000):
        credit.tick_ended({"passes": 5.0}, still_wanted=True)
    assert credit.seconds < 60


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.8])
@virtual
async def test_training_and_samples_take_the_configured_shares_of_a_busy_group(
    tmp_path, share: float
) -> None:
    """Passes of two seconds without end beside samples without end, in virtual time."""
    config = make_config()
    config.models[0].sampler.share = share
    group = EchoGroup(pass_s=2.0)
    async with control_plane(tmp_path, group, config) as plane:
        client = await Client(plane).open()
        run = await client.create()
        sampler = await plane.create_sampler(TENANT, client.session, 0, "base", None)
        waiting = asyncio.ensure_future(client.poll(await client.sample(sampler, max_tokens=10**7)))
        for number in range(40):
            await client.submit(run, 2 * number + 1, pass_command("p"))
            last = await client.submit(run, 2 * number + 2, optim())
        first = len(group.ticks)
        await client.result(last)
        waiting.cancel()
        decoded = sum(tick.decode_budget_s for tick in group.ticks[first:])
        trained = sum(group.pass_s for tick in group.ticks[first:] if tick.passes)
    assert trained >= 40 * group.pass_s
    least = 0.05 / 2.05
    assert decoded / (decoded + trained) == pytest.approx(max(share, least), abs=0.05)
