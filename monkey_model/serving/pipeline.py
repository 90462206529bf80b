"""Pictures are read ahead of a device and results written behind it, in order, in bounded memory.

Decoding runs in threads: decoders, torch and file reads let go of Python's lock. Measured once, on
two cores with 12 MP JPEGs: two threads were 1.95 times as fast as one with simplejpeg, and 1.4 to
1.7 times with Pillow, whose copies hold the lock. Two processes, which hand pictures over in shared
memory and each import torch, came to 1.6.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Bytes of the pictures that are decoded and waited for. One picture may go beyond.
READ_AHEAD_BYTES = 2**30

#: Says how many bytes an item takes from now on, and waits until there is room for them.
Reserve: TypeAlias = Callable[[int], None]


def default_workers() -> int:
    """A thread per core that this process may use; beyond 16, an encoder is the slower part."""
    return min(len(os.sched_getaffinity(0)), 16)


class _Budget:
    """The bytes of all items that are not handed out yet."""

    def __init__(self, most: int) -> None:
        self._most, self._used, self._first = most, 0, 0
        self._of: dict[int, int] = {}
        self._changed = threading.Condition()

    def reserve(self, number: int, size: int) -> None:
        with self._changed:
            grown = size - self._of.get(number, 0)
            # The item that everyone waits for never waits itself: it may be larger than the budget,
            # and what fills the budget comes after it.
            self._changed.wait_for(
                lambda: number <= self._first or grown <= 0 or self._used + grown <= self._most
            )
            self._used += grown
            self._of[number] = size
            self._changed.notify_all()

    def hand_out(self, number: int) -> None:
        with self._changed:
            self._used -= self._of.pop(number, 0)
            self._first = number + 1
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._first = sys.maxsize
            self._changed.notify_all()


def read_ahead(
    items: Iterable[Item],
    read: Callable[[Item, Reserve], Result],
    *,
    workers: int | None = None,
    most: int | None = None,
    most_bytes: int = READ_AHEAD_BYTES,
) -> Iterator[tuple[Item, Future[Result]]]:
    """Each item in order, with the future of what ``read`` makes of it, which is done.

    Args:
        items: taken as they are needed, by the thread that iterates.
        read: called in a worker thread, with a function to reserve memory before it takes it. What
            it raises is the future's exception: it costs no other item anything.
        workers: threads; by default :func:`default_workers`.
        most: items in work or waiting, by default twice as many as threads.
        most_bytes: what they may have reserved together. The first of them is never held up, so
            that one item may go beyond.
    """
    workers = workers or default_workers()
    most = most or 2 * workers
    budget = _Budget(most_bytes)
    waiting: deque[tuple[int, Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="monkey-read")
    try:
        for number, item in enumerate(items):
            if len(waiting) == most:
                yield _first(waiting, budget)
            reserve = _reserve(budget, number)
            waiting.append((number, item, pool.submit(read, item, reserve)))
        while waiting:
            yield _first(waiting, budget)
    finally:
        budget.close()
        pool.shutdown(cancel_futures=True)


def _reserve(budget: _Budget, number: int) -> Reserve:
    return lambda size: budget.reserve(number, size)


def _first(
    waiting: deque[tuple[int, Item, Future[Result]]], budget: _Budget
) -> tuple[Item, Future[Result]]:
    number, item, future = waiting.popleft()
    wait([future])
    budget.hand_out(number)
    return item, future


class _Abandoned(Exception):
    """Nothing more comes, and what is begun is not to be finished."""


class _End:
    def __init__(self, abandoned: bool) -> None:
        self.abandoned = abandoned


class _Writer(Generic[Item]):
    def __init__(self, write: Callable[[Iterator[Item]], None], most: int) -> None:
        self._write = write
        self._queue: queue.Queue[Item | _End] = queue.Queue(most)
        self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="monkey-write")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._write(self._items())
        except _Abandoned:
            pass
        except BaseException as error:  # for the thread that puts
            self._error = error
        while not self._ended:  # nobody must be left waiting for room
            self._ended = isinstance(self._queue.get(), _End)

    def _items(self) -> Iterator[Item]:
        while not isinstance(item := self._queue.get(), _End):
            yield item
        self._ended = True
        if item.abandoned:
            raise _Abandoned

    def put(self, item: Item) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put(item)

    def end(self, abandoned: bool) -> None:
        self._queue.put(_End(abandoned))
        self._thread.join()
        if self._error is not None and not abandoned:
            raise self._error


@contextmanager
def write_behind(
    write: Callable[[Iterator[Item]], None], most: int
) -> Iterator[Callable[[Item], None]]:
    """A function that hands items to ``write``, which runs in a thread of its own.

    Args:
        write: gets an iterator of the items. Where the block ends in an exception, the iterator
            raises, so that what ``write`` has begun, such as a file, is not finished.
        most: items that wait to be written; then the function waits.

    Raises:
        What ``write`` raises comes out of the function, or at the end of the block.
    """
    writer = _Writer(write, most)
    try:
        yield writer.put
    except BaseException:
        writer.end(abandoned=True)
        raise
    writer.end(abandoned=False)


def in_batches(
    rows: Iterable[Item], size: int, good: Callable[[Item], bool]
) -> Iterator[list[Item]]:
    """Lists of rows with ``size`` good ones each, and the bad ones that come between."""
    batch: list[Item] = []
    count = 0
    for row in rows:
        batch.append(row)
        count += good(row)
        if count == size:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class Mark:
    """A point in a device's work: when it was asked for, and on CUDA the event."""

    time: float
    event: Any = None


class Device:
    """Copies to and from a device, and the time that it has nothing to do.

    On CUDA all of it is asynchronous, and uploads take a stream of their own: those of the next
    batch run beside the arithmetic of this one. (That part has not run on a GPU yet.)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        self._uploads = torch.cuda.Stream(device) if self._cuda else None
        self._started = time.perf_counter()
        self._waited = 0.0
        self._last_end: Mark | None = None

    def upload(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the device; of pinned tensors, beside its other work."""
        if self._uploads is None:
            return [tensor.to(self.device) for tensor in tensors]
        with torch.cuda.stream(self._uploads):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._uploads)
        for copy in copies:
            copy.record_stream(current)  # or the upload stream would take its memory back early
        return copies

    def download(self, tensor: Tensor) -> Tensor:
        """A copy for the CPU, complete once a mark made after it is :meth:`reached <reach>`."""
        if not self._cuda:
            return tensor.cpu()
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return copy.copy_(tensor, non_blocking=True)

    def mark(self) -> Mark:
        """Here and now."""
        if not self._cuda:
            return Mark(time.perf_counter())
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return Mark(time.perf_counter(), event)

    def reach(self, start: Mark, end: Mark) -> None:
        """Wait for a batch's ``end``; what lies between its ``start`` and the end of the batch
        before it, the device had nothing to do. For one thread, batch by batch."""
        if self._cuda:
            end.event.synchronize()
        if self._last_end is None:
            self._waited += start.time - self._started
        elif self._cuda:
            self._waited += self._last_end.event.elapsed_time(start.event) / 1000
        else:
            self._waited += start.time - self._last_end.time
        self._last_end = end

    def share_waited(self) -> float:
        """The part of the time since the beginning in which the device had nothing to do."""
        return min(self._waited / max(time.perf_counter() - self._started, 1e-9), 1.0)
