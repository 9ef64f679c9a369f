"""Running feeds on the workers of a Dask cluster."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import dask
from distributed import Client, Future, KilledWorker, LocalCluster, WorkerPlugin, as_completed, get_worker

from ..errors import EngineError
from ..runtime import Feed
from ..threads import available_cores
from .engine import Advance, NumberedFeeds
from .observation import Job, ModelObserver, StateFile

#: A task runs feeds until there are so many, or so many bytes.
TASK_FEEDS, TASK_BYTES = 8, 16 << 20
#: Tasks for each thread of the cluster, between two merges with what was observed before.
TASKS_A_THREAD = 2
#: Observers that one task merges.
MERGED = 4
#: Seconds to wait for the scheduler, and for its first worker, which may just be starting.
SCHEDULER_PATIENCE, WORKER_PATIENCE = 8, 30

_Batch = list[tuple[int, Feed]]


class DaskEngine:
    """Maps feeds over the workers of a Dask cluster and merges what they observed.

    A task runs a few feeds and returns their observers; other tasks merge those, so that one result comes back from
    each round. What a worker takes along when it dies, Dask runs again on another one. The model is sent to each worker
    once, also to those that join later. The workers need this package in the same version as the client.

    Parameters
    ----------
    scheduler : str, optional
        The address of a running cluster's scheduler. By default worker processes are started on this machine, one for
        each core, and stopped afterwards.
    """

    def __init__(self, scheduler: str | None = None) -> None:
        self._scheduler = scheduler

    def run(
        self,
        job: Job,
        feeds: NumberedFeeds,
        into: ModelObserver,
        advance: Advance,
        state: StateFile | None,
    ) -> None:
        """Observe all feeds; see `Engine`.

        Raises
        ------
        EngineError
            If the scheduler can't be reached, has no worker, or lost too many of them.
        """
        name = f"fxp-layernorm-{uuid.uuid4().hex}"
        batches = _batches(feeds)
        with _client(self._scheduler) as client:
            client.register_plugin(_JobPlugin(job, name))
            try:
                while batch := list(islice(batches, TASKS_A_THREAD * max(sum(client.nthreads().values()), 1))):
                    into.merge(_round(client, name, batch, advance))
                    if state is not None and state.due:
                        state.save(into)
            except KilledWorker as error:
                raise EngineError(f"the cluster lost too many workers: {error}") from error
            finally:
                client.unregister_worker_plugin(name)


class _JobPlugin(WorkerPlugin):  # type: ignore[misc]
    """Keeps the job on every worker, those that join or start again included."""

    def __init__(self, job: Job, name: str) -> None:
        self.job, self.name = job, name


def _round(client: Client, name: str, batches: list[_Batch], advance: Advance) -> ModelObserver:
    sizes: dict[str, int] = {}
    level: list[Future] = []
    for batch in batches:
        future = client.submit(_observe, name, batch, pure=False)
        sizes[future.key] = len(batch)
        level.append(future)
    observed = level
    while len(level) > 1:
        groups = [level[start : start + MERGED] for start in range(0, len(level), MERGED)]
        level = [client.submit(_merge, name, group, pure=False) for group in groups]
    for future in as_completed(observed):
        if future.status == "finished":
            advance(sizes[future.key])
    result = level[0].result()
    assert isinstance(result, ModelObserver)
    return result


def _observe(name: str, batch: _Batch) -> ModelObserver:
    job: Job = get_worker().plugins[name].job
    observer = ModelObserver(job.norms)
    for number, feed in batch:
        job.observe(feed, number, observer)
    return observer


def _merge(name: str, observers: list[ModelObserver]) -> ModelObserver:
    # into a new one: a result that Dask keeps must not change, as it may be merged again
    merged = ModelObserver(get_worker().plugins[name].job.norms)
    for observer in observers:
        merged.merge(observer)
    return merged


def _batches(feeds: NumberedFeeds) -> Iterator[_Batch]:
    batch: _Batch = []
    size = 0
    for number, feed in feeds:
        batch.append((number, feed))
        size += sum(array.nbytes for array in feed.values())
        if len(batch) == TASK_FEEDS or size >= TASK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _client(scheduler: str | None) -> Iterator[Client]:
    # feeds are part of the tasks on purpose: data that only a worker holds would be lost with it
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TiB"}):
        if scheduler is None:
            with (
                LocalCluster(
                    n_workers=available_cores(), threads_per_worker=1, processes=True, dashboard_address=None,
                    silence_logs=logging.ERROR,
                ) as cluster,
                Client(cluster) as client,
            ):  # fmt: skip
                yield client
            return
        try:
            client = Client(scheduler, timeout=SCHEDULER_PATIENCE)
        except Exception as error:  # what answers there may be anything, and make Dask raise anything
            raise EngineError(
                f"the scheduler {scheduler} can't be reached: {str(error) or type(error).__name__}"
            ) from error
        with client:
            try:
                client.wait_for_workers(1, timeout=WORKER_PATIENCE)
            except TimeoutError as error:
                raise EngineError(f"the scheduler {scheduler} has no worker after {WORKER_PATIENCE} s") from error
            yield client
