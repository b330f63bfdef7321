# SPDX-License-Identifier: Apache-2.0
"""Work done ahead in threads, with results in order: reading and decoding of images, encoding of questions."""

from __future__ import annotations

import collections
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T, R = TypeVar("T"), TypeVar("R")


def map_ahead(function: Callable[[T], R], items: Iterable[T], num_threads: int, ahead: int) -> Iterator[Future[R]]:
    """Yields the future of each item in order; at most `ahead` items are computed before they are taken."""
    source = iter(items)
    with ThreadPoolExecutor(num_threads) as pool:
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
