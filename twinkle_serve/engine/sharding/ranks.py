"""The ranks of a group as one of them sees it: who it is, and every way in which ranks talk.

Knows torch.distributed, with a deadline on every call. Does not know models, adapters or requests. Alone,
every call is what it would be among one: nothing is sent, and torch.distributed is not touched.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from ipaddress import ip_address
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from twinkle_serve.engine.sharding.place import RankPlace

logger = logging.getLogger(__name__)
T = TypeVar("T")

# The older names warn where the newer ones exist.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class RankLost(Exception):
    """A peer died, left the common order of collectives or is late: this group cannot go on."""


class PeerFailed(Exception):
    """A rank could not do its part of an action, so none did; what was wrong there is in the message."""

    def __init__(self, message: str, *, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


def is_out_of_memory(error: Exception) -> bool:
    """The same answer on all ranks for what ``Ranks.exchange`` raises."""
    if isinstance(error, PeerFailed):
        return error.out_of_memory
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = ("can't allocate memory", "out of memory")  # by the CPU's allocator, and by a library on a GPU
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def ends_rank(error: Exception) -> bool:
    """Whether nothing further can be done on this rank: a peer is gone, or its own device."""
    if isinstance(error, torch.AcceleratorError):
        return not is_out_of_memory(error)
    return isinstance(error, RankLost)


class Ranks:
    """A rank's view of its group. All ranks must make the same calls in the same order."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self._meetings = 0
        self.bytes_sent = 0
        """By this rank through tensors, as the usual ring algorithms move them; objects do not count."""

    @classmethod
    def join(cls, place: RankPlace | None, device: torch.device) -> Ranks:
        """Meet the peers; alone without a place, or with a group of one.

        A process is in one group: later engines in it share the first one's. Raises RankLost when not all
        ranks came in time.
        """
        if place is None or place.world_size == 1:
            return cls()
        if dist.is_initialized():
            assert (dist.get_rank(), dist.get_world_size()) == (place.rank, place.world_size)
            return cls(place.rank, place.world_size)
        host, _, port = place.address.removeprefix("tcp://").rpartition(":")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with _lost_if_it_fails("meeting"):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=_store(host, int(port), place),
                rank=place.rank,
                world_size=place.world_size,
                timeout=timedelta(seconds=place.timeout_s),
            )
        return cls(place.rank, place.world_size)

    def wait_for_all(self, timeout_s: float) -> None:
        """Until all ranks came here, for something that may take much longer than a collective.

        Raises RankLost."""
        if self.size == 1:
            return
        self._meetings += 1
        store, name = dist.distributed_c10d._get_default_store(), f"meeting{self._meetings}"
        with _lost_if_it_fails("waiting for all ranks"):
            if store.add(name, 1) % self.size == 0:
                store.set(f"{name}/all", "here")
            store.wait([f"{name}/all"], timedelta(seconds=timeout_s))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        """Leave the group. Engines that share it are of no use afterwards."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    # small objects --------------------------------------------------------------------------------

    def everyone(self, item: T) -> list[T]:
        """Each rank's item, by rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        with _lost_if_it_fails("telling each other"):
            dist.all_gather_object(items, item)
        return items

    def sharing(self, thing: object) -> tuple[int, int]:
        """This rank's place among those whose ``thing`` is equal to its own, and how many they are."""
        things = self.everyone(thing)
        return things[: self.rank].count(thing), things.count(thing)

    def any(self, flag: bool) -> bool:
        return flag if self.size == 1 else any(self.everyone(flag))

    def of_first(self, item: T) -> T:
        """The first rank's item."""
        if self.size == 1:
            return item
        items = [item]
        with _lost_if_it_fails("hearing the first rank"):
            dist.broadcast_object_list(items, src=0)
        return items[0]

    def exchange(self, item: T | None, error: Exception | None) -> list[T]:
        """Each rank's item, by rank. If there is an error on one, PeerFailed is raised on all; if that
        one cannot go on, its own error there, and its peers miss it."""
        if error is not None and ends_rank(error):
            raise error
        reports = self.everyone((item, None if error is None else _Trouble.of(error)))
        troubles = [(rank, trouble) for rank, (_, trouble) in enumerate(reports) if trouble is not None]
        if troubles:
            text = "; ".join(f"rank {rank}: {trouble.text}" for rank, trouble in troubles)
            out_of_memory = any(trouble.out_of_memory for _, trouble in troubles)
            raise PeerFailed(text, out_of_memory=out_of_memory) from error
        return [item for item, _ in reports]  # type: ignore[misc]

    def together(self, action: Callable[[], T]) -> T:
        """Every rank's own ``action``, which makes no collectives. If it raises on one, all raise PeerFailed;
        alone, its own error."""
        if self.size == 1:
            return action()
        result, error = _attempt(action)
        self.exchange(None, error)
        return result  # type: ignore[return-value]

    def alike(self, action: Callable[[], T]) -> T:
        """Every rank's own ``action``. What it raises on one is raised on all: the lowest rank's error
        if there are several, and PeerFailed if it cannot be sent. Alone, its own error."""
        if self.size == 1:
            return action()
        result, error = _attempt(action)
        if error is not None and ends_rank(error):
            raise error
        sent = error
        if error is not None and not _travels(error):
            sent = PeerFailed(f"rank {self.rank}: {type(error).__name__}: {error}")
        for failure in self.everyone(sent):
            if failure is not None:
                raise failure from error
        return result  # type: ignore[return-value]

    def on_first(self, action: Callable[[], T], told: tuple[type[Exception], ...] = (Exception,)) -> T | None:
        """``action`` on the first rank alone, None elsewhere. What it raises is raised on all ranks: as it is
        if it is one of ``told`` and can be sent, else as PeerFailed. Alone, its own error."""
        if self.size == 1:
            return action()
        result, error = _attempt(action) if self.is_first else (None, None)
        if error is not None and not (isinstance(error, told) and _travels(error)):
            error = PeerFailed(f"rank 0: {type(error).__name__}: {error}")
        error = self.of_first(error)
        if error is not None:
            raise error
        return result

    # tensors --------------------------------------------------------------------------------------

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor by the sum over all ranks; the same bits on each."""
        if self.size == 1:
            return
        self.bytes_sent += 2 * tensor.nbytes * (self.size - 1) // self.size
        with _lost_if_it_fails("a sum"):
            dist.all_reduce(tensor)

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, ...] of each rank, N the same on all, end to end: [ranks * N, ...]."""
        out, rows = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:]), rows.contiguous()
        self.bytes_sent += rows.nbytes * (self.size - 1)
        with _lost_if_it_fails("gathering rows"):
            _all_gather(out, rows)
        return out

    def reduce_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of [ranks * N, ...], of which each rank gets its own part [N, ...]."""
        out, rows = rows.new_empty(rows.shape[0] // self.size, *rows.shape[1:]), rows.contiguous()
        self.bytes_sent += out.nbytes * (self.size - 1)
        with _lost_if_it_fails("reducing rows"):
            _reduce_scatter(out, rows)
        return out

    def swap_rows(self, rows: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Send ``sent[q]`` consecutive rows to each rank q; returns what came, by rank."""
        out, rows = rows.new_empty(sum(received), *rows.shape[1:]), rows.contiguous()
        width = rows[:1].nbytes if rows.shape[0] else 0
        self.bytes_sent += width * (sum(sent) - sent[self.rank])
        with _lost_if_it_fails("swapping rows"):
            dist.all_to_all_single(out, rows, list(received), list(sent))
        return out

    def send_to_first(self, tensor: torch.Tensor) -> None:
        with _lost_if_it_fails("sending to the first rank"):
            dist.send(tensor.contiguous(), 0)

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        with _lost_if_it_fails(f"sending to rank {rank}"):
            dist.send(tensor.contiguous(), rank)

    def receive(self, like: torch.Tensor, rank: int) -> torch.Tensor:
        """A tensor of the shape and type of ``like``, which is overwritten."""
        with _lost_if_it_fails(f"waiting for rank {rank}"):
            dist.recv(like, rank)
        return like

    def sum_on_first(self, tensor: torch.Tensor) -> None:
        """On the first rank, replace a contiguous tensor by the sum over all; elsewhere spoil it."""
        if self.size == 1:
            return
        with _lost_if_it_fails("a sum for the first rank"):
            dist.reduce(tensor, 0)

    def copy_of_first_(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor by the first rank's."""
        if self.size == 1:
            return
        with _lost_if_it_fails("a copy of the first rank's tensor"):
            dist.broadcast(tensor, 0)


def _travels(error: Exception) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False


class _Trouble(NamedTuple):
    text: str
    out_of_memory: bool

    @classmethod
    def of(cls, error: Exception) -> _Trouble:
        return cls(f"{type(error).__name__}: {error}", is_out_of_memory(error))


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except RankLost:
        raise
    except Exception as error:
        return None, error


@contextmanager
def _lost_if_it_fails(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # gloo's and nccl's, timeouts included
        raise RankLost(f"{what} failed: {error}") from error


def _store(host: str, port: int, place: RankPlace) -> dist.TCPStore:
    """Where ranks find each other. On a loopback address nothing listens to the rest of the world."""
    listener = None
    if place.rank == 0:
        listener = socket.create_server((host, port), backlog=place.world_size * 2)
    if _is_loopback(host):
        names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
    return dist.TCPStore(
        host,
        port,
        place.world_size,
        is_master=place.rank == 0,
        timeout=timedelta(seconds=place.timeout_s),
        master_listen_fd=None if listener is None else listener.detach(),
    )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
