# SPDX-License-Identifier: Apache-2.0
"""Work done ahead, with results in order: images read and decoded in threads or processes, questions encoded."""

from __future__ import annotations

import collections
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

T, R = TypeVar("T"), TypeVar("R")
MIN_CORES = 5  # below this number of CPU cores, processes that read images take them from the model
MAX_WORKERS = 8
MIN_ITEMS_OF_WORKER = 64  # a process starts in about a second


def choose_num_workers(num_items: int) -> int:
    """Processes for reading `num_items` images: half of the CPU cores, at most 8; 0 for few cores or few images."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores < MIN_CORES else min(cores // 2, MAX_WORKERS, num_items // MIN_ITEMS_OF_WORKER)


def map_ahead(function: Callable[[T], R], items: Iterable[T], pool: Executor, ahead: int) -> Iterator[Future[R]]:
    """Yields the future of each item in order; at most `ahead` items are computed before they are taken.

    The pool is shut down at the end.
    """
    source = iter(items)
    with pool:
        futures = collections.deque(pool.submit(function, item) for item in itertools.islice(source, ahead))
        try:
            while futures:
                yield futures.popleft()
                futures.extend(pool.submit(function, item) for item in itertools.islice(source, 1))
        finally:
            for future in futures:
                future.cancel()


def in_background(items: Iterable[T], ahead: int) -> Iterator[T]:
    """The items, made by a thread that is at most `ahead` of them in front. An exception is raised in its place."""
    results: queue.Queue[tuple[bool, object]] = queue.Queue(ahead)
    is_closed = threading.Event()

    def offer(entry) -> bool:
        while not is_closed.is_set():
            try:
                results.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work():
        try:
            for item in items:
                if not offer((True, item)):
                    return
            offer((False, None))
        except BaseException as error:
            offer((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            is_item, found = results.get()
            if is_item:
                yield found
            elif found is None:
                return
            else:
                raise found
    finally:
        is_closed.set()
        thread.join()
