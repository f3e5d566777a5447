"""The catalogue without a database, for the thousands of short lives of the simulator."""

from __future__ import annotations

from typing import Any

from twinkle_serve.storage.catalog import Contents


class MemoryCatalog:
    """storage.catalog.Catalog whose rows nobody reads again."""

    def __init__(self) -> None:
        self.num_writes = 0

    def put(self, record: Any) -> None:
        self.num_writes += 1

    put_session = put_run = put_sampler = put_checkpoint = put

    def delete_checkpoint(self, run_id: str, kind: str, name: str) -> None:
        self.num_writes += 1

    def set_checkpoint(self, run_id: str, kind: str, name: str, **changes: Any) -> None:
        self.num_writes += 1

    def load_all(self) -> Contents:
        return Contents((), (), (), ())

    def directory_for(self, run_id: str, kind: str, name: str) -> str:
        return f"/nowhere/{run_id}/{kind}/{name}"

    def remove_directory(self, directory: str) -> None:
        pass

    def close(self) -> None:
        pass
