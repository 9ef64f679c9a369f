"""Where feeds are run: on threads of this process, or anywhere else that can run a `Job`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from ..errors import InputError, MissingDependencyError
from ..runtime import Feed
from ..threads import available_cores
from .observation import Job, ModelObserver, StateFile

NumberedFeeds = Iterator[tuple[int, Feed]]
Advance = Callable[[int], None]


class Engine(Protocol):
    """Runs a job over feeds. The observers merge exactly, so all engines leave the same state to the last bit."""

    def run(
        self,
        job: Job,
        feeds: NumberedFeeds,
        into: ModelObserver,
        advance: Advance,
        state: StateFile | None,
    ) -> None:
        """Observe all feeds.

        `advance` is called with the number of feeds that are new since its last call. `state` is saved when it is due,
        while `into` holds all feeds up to some number and no other.
        """


class LocalEngine:
    """Runs feeds on the threads of this process, a feed on each.

    Parameters
    ----------
    threads : int, optional
        By default the number of cores that this process may use. Memory holds the activations of as many feeds.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or available_cores()

    def run(
        self,
        job: Job,
        feeds: NumberedFeeds,
        into: ModelObserver,
        advance: Advance,
        state: StateFile | None,
    ) -> None:
        """Observe all feeds; see `Engine`."""
        under_way: deque[Future[None]] = deque()

        def wait(left: int) -> None:
            count = 0
            while len(under_way) > left:
                under_way.popleft().result()
                count += 1
            advance(count)

        with ThreadPoolExecutor(self._threads) as pool:
            try:
                for number, feed in feeds:
                    under_way.append(pool.submit(job.observe, feed, number, into))
                    wait(self._threads)  # so many run, and the next one is read
                    if state is not None and state.due:
                        wait(0)
                        state.save(into)
                wait(0)
            except KeyboardInterrupt:
                pool.shutdown()  # what runs is finished: the feeds are then all up to one
                if state is not None and into.feeds and not any(future.exception() for future in under_way):
                    state.save(into)
                raise
            finally:
                for future in under_way:
                    future.cancel()


def parse_engine(name: str, scheduler: str | None = None) -> Engine:
    """Return the engine of a name, ``local`` or ``dask``.

    Raises
    ------
    InputError
        If there is none of that name, or it takes no scheduler.
    MissingDependencyError
        If dask.distributed is needed and not installed.
    """
    if name == "dask":
        try:
            from .dask_engine import DaskEngine
        except ImportError as error:
            raise MissingDependencyError(
                f"the engine dask needs dask.distributed ({error}): pip install 'fxp-layernorm[dask]'"
            ) from error
        return DaskEngine(scheduler)
    if name != "local":
        raise InputError(f"the engine is {name!r}; it must be local or dask")
    if scheduler is not None:
        raise InputError("only the engine dask takes a scheduler")
    return LocalEngine()
