"""The adapters that samples are drawn with: frozen weights by name, the most recently used ones at hand.

Knows snapshots and checkpoint directories. Does not know requests or who may use which adapter.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from twinkle_serve.engine.adapter_files import load_adapter
from twinkle_serve.engine.layout import AdapterLayout
from twinkle_serve.engine.page_store import PageStore
from twinkle_serve.engine.slots import Adapter
from twinkle_serve.protocol.work import AdapterRef


class SampleAdapters:
    """A cache of ``capacity`` adapters on the device. One that a running request holds stays usable after it
    was dropped from the cache, so eviction is never seen by a client."""

    def __init__(
        self,
        layout: AdapterLayout,
        snapshots: PageStore,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._layout = layout
        self._snapshots = snapshots
        self._capacity = capacity
        self._device = device
        self._dtype = dtype
        self._cache: OrderedDict[str, Adapter] = OrderedDict()

    def get(self, ref: AdapterRef) -> Adapter:
        """The adapter of ``ref``. Raises KeyError for a snapshot that is gone, and what load_adapter raises
        for a checkpoint."""
        found = self._cache.get(ref.adapter)
        if found is None:
            if ref.directory is None:
                state = self._snapshots.get(ref.adapter)
            else:
                state = load_adapter(ref.directory, self._layout, optimizer=False)
            found = Adapter(self._layout, state.spec, state.weights.to(self._device), dtype=self._dtype)
            self._cache[ref.adapter] = found
        self._cache.move_to_end(ref.adapter)
        while len(self._cache) > self._capacity:
            self._cache.popitem(last=False)
        return found

    def drop(self, name: str) -> None:
        self._cache.pop(name, None)
