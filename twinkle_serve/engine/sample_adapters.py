"""The adapters that samples are drawn with: frozen weights by name, the most recently used ones at hand.

Knows snapshots and checkpoint directories. Does not know requests or who may use which adapter.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from twinkle_serve.engine.adapter_files import load_adapter
from twinkle_serve.engine.layout import AdapterLayout
from twinkle_serve.engine.page_store import PageStore
from twinkle_serve.engine.slots import Adapter, AdapterState
from twinkle_serve.engine.state_files import read_state
from twinkle_serve.protocol.work import AdapterRef
from twinkle_serve.storage.checkpoints import STATE_SUFFIX


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
            in_memory = ref.directory is None
            state = self._snapshots.get(ref.adapter) if in_memory else self._read(str(ref.directory))
            found = Adapter(self._layout, state.spec, state.weights.to(self._device), dtype=self._dtype)
            self._cache[ref.adapter] = found
        self._cache.move_to_end(ref.adapter)
        while len(self._cache) > self._capacity:
            self._cache.popitem(last=False)
        return found

    def _read(self, path: str) -> AdapterState:
        if path.endswith(STATE_SUFFIX):
            return read_state(path)
        return load_adapter(path, self._layout, optimizer=False)

    def drop(self, name: str) -> None:
        self._cache.pop(name, None)
