"""Named checkpoints: who may see them, which names are taken, when one expires, and when files may go.

Knows records, pins and the catalogue. Does not know how a checkpoint is written or read.
"""

from __future__ import annotations

import heapq
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from twinkle_serve.control.backend import Invalid, NotFound
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.paths import CheckpointPath, parse_path, validate_name
from twinkle_serve.storage.records import CheckpointRecord

if TYPE_CHECKING:
    from twinkle_serve.storage.catalog import Catalog

logger = logging.getLogger(__name__)
MIN_TTL_S = 3600
MAX_TTL_S = 10 * 365 * 86400
Key = tuple[str, str, str]


def check_ttl(ttl_seconds: int | None) -> None:
    """Raises UserError unless it is None (never expires) or between an hour and ten years."""
    if ttl_seconds is not None and not MIN_TTL_S <= ttl_seconds <= MAX_TTL_S:
        raise UserError(f"ttl_seconds {ttl_seconds} is not between {MIN_TTL_S} and {MAX_TTL_S}")


def key_of(record: CheckpointRecord) -> Key:
    return record.run_id, record.kind, record.name


def path_of(key: Key) -> str:
    return str(CheckpointPath(*key))


Noted = Callable[[str, CheckpointRecord], object]


class Checkpoints:
    """All listed checkpoints. Files of one that is pinned (being loaded or sampled from) outlive its
    removal from the list until the last pin is gone."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._records: dict[Key, CheckpointRecord] = {}
        self._by_run: dict[str, dict[Key, None]] = {}
        self._by_tenant: dict[str, dict[Key, None]] = {}
        self.sizes: Counter[str] = Counter()  # bytes by tenant
        self.noted: Noted = lambda event, record: None
        self._saving: Counter[Key] = Counter()
        self._held: dict[Key, tuple[str, int]] = {}  # of copies that are being made: whose, and bytes
        self._pins: Counter[str] = Counter()
        self._doomed: dict[str, Key] = {}  # by directory: deleted, and still being read
        self._expiry: list[tuple[float, Key]] = []

    def restore(self, record: CheckpointRecord) -> None:
        key = key_of(record)
        for index in (
            self._by_run.setdefault(record.run_id, {}),
            self._by_tenant.setdefault(record.tenant, {}),
        ):
            index.pop(key, None)
            index[key] = None
        self.sizes[record.tenant] += record.size_bytes - self._size(key)
        self._records[key] = record
        if record.expires_at is not None:
            heapq.heappush(self._expiry, (record.expires_at, key))

    # saving ---------------------------------------------------------------------------------------

    def reserve(
        self, run_id: str, kind: str, name: str, overwrite: bool, held: tuple[str, int] | None = None
    ) -> str:
        """Take a name for a save that starts now; the directory to write. held: whose, and how many bytes,
        count from now on, if that is known. Raises UserError."""
        key = (run_id, kind, validate_name(name))
        if not overwrite and (key in self._records or self._saving[key]):
            raise UserError(f"checkpoint {path_of(key)} exists already; pass overwrite=True to replace it")
        directory = str(self._catalog.directory_for(*key))
        if directory in self._doomed:
            raise UserError(f"checkpoint {path_of(key)} was deleted but is still being read; try again later")
        self._saving[key] += 1
        if held is not None:
            self._held[key] = held
        return directory

    def commit(self, record: CheckpointRecord, size_bytes: int) -> None:
        """The save is over, and on disk: list it. If this raises, it has failed."""
        record, key = replace(record, size_bytes=size_bytes), key_of(record)
        if self._doomed.pop(record.directory, None) is not None:
            self._catalog.mark_deleted(record.directory, False)  # what is there now is this save's
        try:
            self._catalog.put_checkpoint(record)
        except Exception:
            self.discard(key, record.directory)
            raise
        self._release(key)
        self.restore(record)
        self.noted("created", record)

    def discard(self, key: Key, directory: str) -> None:
        """The save is over, and failed."""
        self._release(key)
        try:
            self._clear(key, directory)
        except OSError as error:
            logger.error("the files of %s, which failed to be saved, are left: %s", path_of(key), error)

    def _release(self, key: Key) -> None:
        self._saving[key] -= 1
        self._held.pop(key, None)
        if not self._saving[key]:
            del self._saving[key]

    def _clear(self, key: Key, directory: str) -> None:
        """Remove files that nobody lists, writes or reads; whoever ends the last of these calls again."""
        if key in self._records or self._saving[key]:
            return
        if self._pins[directory]:
            self._doomed[directory] = key
            self._catalog.mark_deleted(directory)  # in case that this process ends first
            return
        self._doomed.pop(directory, None)
        self._catalog.remove_directory(directory)

    def is_saving(self, path: str) -> bool:
        """Whether a save to that path is under way; whoever wants to read it should wait."""
        try:
            parsed = parse_path(path)
        except UserError:
            return False
        return (parsed.run_id, parsed.kind, parsed.name) in self._saving

    # reading --------------------------------------------------------------------------------------

    def find(self, tenant: str, path: str) -> CheckpointRecord:
        """The tenant's own checkpoint, or anybody's published one. Raises NotFound, Invalid."""
        record = self._records.get(_key(path))
        if record is None or not (record.public or record.tenant == tenant):
            raise NotFound(f"checkpoint {path!r} does not exist")
        return record

    def at(self, key: Key) -> CheckpointRecord | None:
        """Whoever owns it."""
        return self._records.get(key)

    def owned(self, tenant: str, path: str) -> CheckpointRecord:
        record = self._records.get(_key(path))
        if record is None or record.tenant != tenant:
            raise NotFound(f"checkpoint {path!r} does not exist")
        return record

    def of_run(self, run_id: str) -> list[CheckpointRecord]:
        """Newest first."""
        return [self._records[key] for key in reversed(self._by_run.get(run_id, {}))]

    def of_tenant(self, tenant: str) -> list[CheckpointRecord]:
        """Newest first."""
        return [self._records[key] for key in reversed(self._by_tenant.get(tenant, {}))]

    @property
    def num_bytes(self) -> int:
        """Of all tenants, copies that are being made included."""
        return self.sizes.total() + sum(size for _, size in self._held.values())

    def bytes_of(self, tenant: str) -> int:
        """The size of all that is listed for the tenant or being copied for it."""
        return self.sizes[tenant] + sum(size for owner, size in self._held.values() if owner == tenant)

    def files(self, record: CheckpointRecord) -> dict[str, str]:
        """Each file's name within the checkpoint to its absolute path."""
        directory = Path(record.directory).absolute()
        return {name: str(directory / name) for name in self._catalog.files(directory)}

    def copy_files(self, source: CheckpointRecord, directory: str) -> int:
        """Make a whole checkpoint at ``directory`` of the files of ``source``. Its size in bytes. Blocks."""
        return self._catalog.copy_directory(source.directory, directory)

    def pin(self, directory: str) -> None:
        self._pins[directory] += 1

    def unpin(self, directory: str) -> None:
        self._pins[directory] -= 1
        if not self._pins[directory]:
            del self._pins[directory]
            if directory in self._doomed:
                self._clear(self._doomed[directory], directory)

    # changing -------------------------------------------------------------------------------------

    def publish(self, record: CheckpointRecord, public: bool) -> None:
        if record.public != public:
            self._update(replace(record, public=public))
            self.noted("published" if public else "unpublished", record)

    def set_ttl(self, record: CheckpointRecord, ttl_seconds: int | None, now: float) -> None:
        check_ttl(ttl_seconds)
        expires_at = None if ttl_seconds is None else now + ttl_seconds
        self._update(replace(record, expires_at=expires_at))
        if expires_at is not None:
            heapq.heappush(self._expiry, (expires_at, key_of(record)))

    def delete(self, record: CheckpointRecord, event: str = "deleted") -> None:
        """Take it out of the list at once; its files go when nobody reads them."""
        key = key_of(record)
        self._catalog.delete_checkpoint(*key)
        self.sizes[record.tenant] -= self._size(key)
        del self._records[key]
        del self._by_run[record.run_id][key]
        del self._by_tenant[record.tenant][key]
        # An overwriting save brings its own files there.
        if self._pins[record.directory]:
            self._doomed[record.directory] = key
            self._catalog.mark_deleted(record.directory)
        self._clear(key, record.directory)
        self.noted(event, record)

    def expire(self, now: float) -> None:
        """Delete what is past its time. A changed or cancelled time left a stale entry: skip it."""
        while self._expiry and self._expiry[0][0] <= now:
            expires_at, key = self._expiry[0]
            record = self._records.get(key)
            if record is not None and record.expires_at == expires_at:
                self.delete(record, "expired")
            heapq.heappop(self._expiry)

    def _size(self, key: Key) -> int:
        record = self._records.get(key)
        return 0 if record is None else record.size_bytes

    def _update(self, record: CheckpointRecord) -> None:
        # First on disk: nobody may see what did not become so.
        self._catalog.set_checkpoint(*key_of(record), public=record.public, expires_at=record.expires_at)
        self._records[key_of(record)] = record


def _key(path: str) -> Key:
    try:
        parsed = parse_path(path)
    except UserError as error:
        raise Invalid(str(error)) from None
    return parsed.run_id, parsed.kind, parsed.name
