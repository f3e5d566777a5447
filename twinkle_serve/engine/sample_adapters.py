"""The adapters that samples are drawn with, by name: the ones in use and the most recently used ones at hand.

Knows snapshots and checkpoint directories. Does not know requests or who may use which adapter, nor how
adapters share the device's memory (adapter_pool.py).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from functools import partial

from twinkle_serve.engine.adapter_files import load_adapter
from twinkle_serve.engine.adapter_pool import AdapterPool, Pooled, PoolFull
from twinkle_serve.engine.page_store import PageStore
from twinkle_serve.engine.sharding.shares import Shares
from twinkle_serve.engine.slots import AdapterState
from twinkle_serve.engine.state_files import read_state
from twinkle_serve.protocol.work import AdapterRef
from twinkle_serve.storage.checkpoints import STATE_SUFFIX


class SampleAdapters:
    """Adapters stay in the pool until their place is needed. One that a running request holds is never
    evicted, so eviction is never seen by a client."""

    def __init__(self, shares: Shares, snapshots: PageStore, pool: AdapterPool) -> None:
        self._shares = shares
        self._snapshots = snapshots
        self.pool = pool
        self._at_hand: OrderedDict[str, Pooled] = OrderedDict()  # the least recently used first
        self._dropped: list[Pooled] = []  # without a name, but in use
        self._users: Counter[int] = Counter()  # by first row
        # What was read last and found no room: whoever waits with it asks again.
        self._unplaced: tuple[str, AdapterState] | None = None

    def hold(self, ref: AdapterRef) -> Pooled:
        """The adapter of ``ref``, which stays where it is until it is let go as often as it was held.

        The same on all ranks, which ask for the same adapters in the same order: their pools never differ.
        Raises PoolFull while adapters in use leave no room, KeyError for a snapshot that is gone, what
        AdapterPool.check and load_adapter raise, RankLost, and what putting it there may raise once the
        device is full.
        """
        found = self._at_hand.get(ref.adapter)
        if found is None:
            found = self._at_hand[ref.adapter] = self._place(ref.adapter, self._state(ref))
        self._at_hand.move_to_end(ref.adapter)
        self._users[found.first] += 1
        return found

    def let_go(self, pooled: Pooled) -> bool:
        """Whether its place can be another's now: nobody else holds it."""
        self._users[pooled.first] -= 1
        if self._users[pooled.first]:
            return False
        if pooled in self._dropped:
            self._dropped.remove(pooled)
            self.pool.remove(pooled)
        return True

    def drop(self, name: str) -> None:
        """Nobody will ask for it any more; whoever holds it goes on."""
        if self._unplaced is not None and self._unplaced[0] == name:
            self._unplaced = None
        pooled = self._at_hand.pop(name, None)
        if pooled is None:
            return
        if self._users[pooled.first]:
            self._dropped.append(pooled)
        else:
            self.pool.remove(pooled)

    def _place(self, name: str, state: AdapterState) -> Pooled:
        rank = state.spec.rank
        idle = {name: pooled for name, pooled in self._at_hand.items() if not self._users[pooled.first]}
        if self.pool.gap(rank, gone=idle.values()) is None:
            self._unplaced = name, state
            raise PoolFull
        for other in idle:
            if self.pool.gap(rank) is None:
                self.drop(other)
        placed: list[Pooled] = []
        try:
            self._shares.ranks.alike(lambda: placed.append(self.pool.put(state)))
        except Exception:
            for pooled in placed:  # here, but not on a peer
                self.pool.remove(pooled)
            raise
        return placed[0]

    def _state(self, ref: AdapterRef) -> AdapterState:
        unplaced, self._unplaced = self._unplaced, None
        if unplaced is not None and unplaced[0] == ref.adapter:
            return unplaced[1]
        return self._shares.ranks.alike(partial(self._read, ref))

    def _read(self, ref: AdapterRef) -> AdapterState:
        """What may be put into the pool: known on all ranks before any of them has made room for it."""
        state = self._read_own(ref)
        self.pool.check(state)
        return state

    def _read_own(self, ref: AdapterRef) -> AdapterState:
        if ref.directory is None:
            return self._snapshots.get(ref.adapter)
        whole = self._shares.ranks.on_first(partial(self._read_whole, ref.directory))
        return self._shares.distribute(whole)

    def _read_whole(self, path: str) -> AdapterState:
        if path.endswith(STATE_SUFFIX):
            return read_state(path)
        return load_adapter(path, self._shares.whole, optimizer=False)
