"""The engine dask, on a real cluster of processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("distributed")

import dask_feeds
from distributed import Client, LocalCluster
from onnx_models import model_with_norms

from fxp_layernorm import DataError, EngineError
from fxp_layernorm.calibration import ModelCalibration, calibrate_model, dask_engine
from fxp_layernorm.calibration.dask_engine import DaskEngine
from fxp_layernorm.params import ModelParams
from fxp_layernorm.runtime import Feeds

# what dask itself warns of, and sockets that it leaves to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as started:
        yield started


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return saved(calibrate_model(model_with_norms(), Feeds(dask_feeds.feeds)), tmp_path_factory.mktemp("local"))


def saved(params: ModelParams, folder: Path) -> bytes:
    params.save(folder / "params.json")
    return (folder / "params.json").read_bytes()


def test_results_are_those_of_the_local_run(cluster: LocalCluster, expected: bytes, tmp_path: Path) -> None:
    calibration = ModelCalibration(model_with_norms())
    advanced: list[int] = []
    calibration.observe(Feeds(dask_feeds.feeds), advanced.append, engine=DaskEngine(cluster.scheduler_address))
    assert saved(calibration.params(), tmp_path) == expected
    assert sum(advanced) == dask_feeds.COUNT


def test_a_worker_killed_half_way_changes_nothing(
    cluster: LocalCluster, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_engine, "TASK_FEEDS", 2)
    monkeypatch.setattr(dask_engine, "TASKS_A_THREAD", 8)
    with Client(cluster) as client:
        workers = set(client.run(os.getpid).values())
    killed = min(workers)
    advanced: list[int] = []

    def advance(count: int) -> None:
        if not advanced:  # the first task is done, its result lies on a worker, and most are still to come
            os.kill(killed, signal.SIGKILL)
        advanced.append(count)

    calibration = ModelCalibration(model_with_norms())
    calibration.observe(Feeds(dask_feeds.feeds), advance, engine=DaskEngine(cluster.scheduler_address))
    assert saved(calibration.params(), tmp_path) == expected
    with Client(cluster) as client:
        client.wait_for_workers(2)
        assert killed not in client.run(os.getpid).values()


def test_state_files_pass_between_the_engines(
    cluster: LocalCluster, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state.npz"
    first = list(dask_feeds.feeds())[:30]
    ModelCalibration(model_with_norms()).observe(Feeds(first), state=state)
    resumed = ModelCalibration(model_with_norms())
    resumed.observe(Feeds(dask_feeds.feeds), engine=DaskEngine(cluster.scheduler_address), state=state)
    assert saved(resumed.params(), tmp_path) == expected


def test_errors_of_a_worker_are_those_of_the_local_run(cluster: LocalCluster) -> None:
    data: list[dict[str, Any]] = [*list(dask_feeds.feeds())[:3], {}]
    with pytest.raises(DataError, match="feed 3: the data lacks the input 'x'"):
        ModelCalibration(model_with_norms()).observe(Feeds(data), engine=DaskEngine(cluster.scheduler_address))


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["nobody", "another server"])
def test_a_scheduler_that_is_none(answer: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_engine, "SCHEDULER_PATIENCE", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def reply() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].sendall(answer or b"")

        if answer is None:
            server.close()
        threading.Thread(target=reply, daemon=True).start()
        with pytest.raises(EngineError, match=rf"tcp://127\.0\.0\.1:{port} can't be reached"):
            ModelCalibration(model_with_norms()).observe(
                Feeds(dask_feeds.feeds), engine=DaskEngine(f"tcp://127.0.0.1:{port}")
            )
