"""The threads that help with a call: of compiled calls, which look for work before they sleep, and of Python's."""

from __future__ import annotations

import _thread
import atexit
import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

#: Seconds for which a thread looks for work before it sleeps; and where there are more threads than cores.
PATIENCE, SHORT_PATIENCE = 200e-6, 50e-6
#: Calls that the threads may help with at a time; others do without.
CALLS = 4

T = TypeVar("T")


class Team:
    """Threads that help with compiled calls (module `team`), whoever makes them.

    To wake a thread takes 10 to 30 us, as long as a whole call of 200,000 elements. So a thread looks for the next call
    for a while, in compiled code, and then sleeps until a call wakes it. Calls wait for those only that do help.
    """

    def __init__(self) -> None:
        self._words = np.zeros((CALLS, 0), dtype=np.int64)
        self._first, self._looks = 0, 0.0
        self._offers: deque[int] = deque()  # numbers of those that are free
        self._threads: list[threading.Thread] = []
        self._asleep: deque[_thread.LockType] = deque()
        self._growing = threading.Lock()
        self._closed = False

    def call(self, threads: int, kernel: Callable[..., None], *arguments: Any) -> None:
        """Call a kernel, which takes the address of an offer first, with as many threads at most."""
        helpers = threads - 1
        if helpers > len(self._threads):
            self._grow(helpers)
        try:
            offer = self._offers.pop()
        except IndexError:  # as many other calls are under way
            kernel(0, *arguments)
            return
        try:
            self._words[offer, 3] = helpers
            for _ in range(helpers - len(self._threads) + len(self._asleep)):
                try:
                    self._asleep.pop().release()
                except IndexError:  # another call was faster
                    break
            kernel(self._first + offer * self._words.strides[0], *arguments)
        finally:
            self._words[offer, 3] = 0
            self._offers.append(offer)

    def close(self) -> None:
        """End the threads: none may be in compiled code when the interpreter takes that down."""
        self._closed = True
        while self._asleep:
            self._asleep.pop().release()
        for thread in self._threads:
            thread.join(timeout=1)

    def _grow(self, helpers: int) -> None:
        from . import kernels, team

        with self._growing:
            if not self._looks:
                line = team.OFFER // 8
                memory = np.zeros((CALLS + 1) * line, dtype=np.int64)
                skipped = -memory.ctypes.data % team.OFFER // 8
                self._words = memory[skipped : skipped + CALLS * line].reshape(CALLS, line)
                self._first = self._words.ctypes.data
                kernels.serve(self._first, CALLS, 1)
                times = []
                for _ in range(5):
                    start = time.perf_counter()
                    kernels.serve(self._first, CALLS, 500)
                    times.append(time.perf_counter() - start)
                self._looks = 500 / min(times)
                self._offers.extend(range(CALLS))
                atexit.register(self.close)
            while len(self._threads) < helpers and not self._closed:
                thread = threading.Thread(target=self._help, name=f"fxp-layernorm-{len(self._threads)}", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the system allows no more
                    break
                self._threads.append(thread)

    def _help(self) -> None:
        from . import kernels

        gate = _thread.allocate_lock()
        gate.acquire()
        while not self._closed:
            patience = PATIENCE if len(self._threads) < available_cores() else SHORT_PATIENCE
            kernels.serve(self._first, CALLS, int(self._looks * patience))
            self._asleep.append(gate)
            if self._wanted():
                # by a call that has seen this thread awake, but has lost its core before it made its offer
                try:
                    self._asleep.remove(gate)
                except ValueError:  # or has just woken it
                    gate.acquire()
                time.sleep(1e-5)
            elif not self._closed:
                gate.acquire()

    def _wanted(self) -> bool:
        """Return whether threads may join a call, or soon may."""
        # in this order, the opposite of the one in which an offer is made
        return bool(self._words[:, 3].any() or (self._words[:, 0] & 0xFFFFFFFF).any())


#: The threads of this process.
TEAM = Team()


def share(threads: int, parts: Sequence[T], work: Callable[[T], None]) -> None:
    """Do Python's work on each part, by several threads that take the next one when they are done."""
    left = iter(parts)

    def take() -> None:
        for part in left:
            work(part)

    helpers = [_pool(threads - 1).submit(take) for _ in range(threads - 1)]
    take()
    for helper in helpers:
        helper.result()


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="fxp-layernorm")


def _forget() -> None:
    TEAM.__init__()  # type: ignore[misc]
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):  # threads don't survive a fork
    os.register_at_fork(after_in_child=_forget)


@functools.cache
def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
