"""Threads that share one compiled call: that they do, that they fail loudly, and what is left when they are gone."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from numba import njit

import fxp_layernorm as fxp
from fxp_layernorm import team, threads


@njit(error_model="numpy")
def meet(ticket, seen, met):  # type: ignore[no-untyped-def]
    """Note that a thread is here, and wait until all are, for some seconds at most."""
    me = team.take(ticket, len(seen))
    seen[me] = team.direction(ticket)
    for _ in range(1 << 26):
        if np.all(seen):
            met[me] = 1
            break
        team.rest()
    return me


@njit(error_model="numpy")
def fail_late(ticket, seen, met):  # type: ignore[no-untyped-def]
    """Meet, and raise in the thread that has the last part."""
    me = meet(ticket, seen, met)
    if me > 0 and me == len(seen) - 1:
        raise ValueError


@njit(error_model="numpy")
def take_turns(ticket, owners, times):  # type: ignore[no-untyped-def]
    """Take parts, and wait after each until as many have been taken from the other end, or all."""
    mine = team.direction(ticket)
    part = team.take(ticket, len(owners))
    while part >= 0:
        owners[part] = mine
        times[part] += 1
        for _ in range(1 << 26):
            if len(owners) == 1 or np.sum(owners == -mine) >= np.sum(owners == mine) or np.all(owners):
                break
            team.rest()
        part = team.take(ticket, len(owners))


@njit(nogil=True)
def call(offer, function, seen, met):  # type: ignore[no-untyped-def]
    return team.together(offer, function, seen, met)


@pytest.fixture
def own() -> threads.Team:
    return threads.Team()


def together(own: threads.Team, count: int, function: object) -> tuple[np.ndarray, bool]:
    call(0, function, *np.zeros((2, 1), dtype=np.int64))  # compiled before threads wait for it
    seen, met = np.zeros((2, count), dtype=np.int64)
    failed: list[bool] = []
    own.call(count, lambda offer: failed.append(call(offer, function, seen, met)))
    return met, failed[0]


@pytest.mark.parametrize("count", [2, 3])
def test_threads_are_in_one_call_at_the_same_time(own: threads.Team, count: int) -> None:
    for _ in range(3):  # the first call starts threads, and what follows finds them awake
        met, failed = together(own, count, meet)
        assert met.all()
        assert not failed
    own.close()


@pytest.mark.parametrize("parts", [2, 7, 1000])
def test_the_caller_takes_parts_from_the_first_on_and_helpers_from_the_last_on(own: threads.Team, parts: int) -> None:
    call(0, take_turns, *np.zeros((2, 1), dtype=np.int64))
    owners, times = np.zeros((2, parts), dtype=np.int64)
    own.call(2, lambda offer: call(offer, take_turns, owners, times))
    half = parts // 2
    assert (times == 1).all()
    assert (owners[:half] == 1).all()
    assert (owners[parts - half :] == -1).all()
    own.close()


def test_a_thread_that_sleeps_is_woken(own: threads.Team) -> None:
    together(own, 2, meet)
    while not own._asleep:
        pass
    met, _ = together(own, 2, meet)
    assert met.all()
    own.close()


def test_a_failure_in_any_thread_is_told(own: threads.Team) -> None:
    assert together(own, 2, fail_late)[1]
    assert not together(own, 2, meet)[1]  # and does no harm to the next call
    own.close()


def norm_and_codes() -> tuple[fxp.FxpLayerNorm, np.ndarray]:
    spec = fxp.plan(fxp.LayerNorm(64), fxp.QuantParams("int8", 0.1), fxp.QuantParams("int8", 0.05))
    return fxp.FxpLayerNorm(spec), np.random.default_rng(0).integers(-128, 128, (500, 64)).astype(np.int8)


def test_calls_compute_alone_where_no_thread_can_start(monkeypatch: pytest.MonkeyPatch, own: threads.Team) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(threads.TEAM, "call", own.call)
    norm, q = norm_and_codes()
    np.testing.assert_array_equal(norm(q, threads=3), norm(q, threads=1))
    assert own._threads == []


def test_calls_beyond_those_that_threads_can_help_with_compute_alone(own: threads.Team) -> None:
    together(own, 2, meet)
    while own._offers:
        own._offers.pop()
    offers: list[int] = []
    own.call(2, offers.append)
    assert offers == [0]
    own.close()


def test_calls_after_the_end_compute_alone(monkeypatch: pytest.MonkeyPatch, own: threads.Team) -> None:
    monkeypatch.setattr(threads.TEAM, "call", own.call)
    norm, q = norm_and_codes()
    expected = norm(q, threads=3)
    own.close()
    assert not any(thread.is_alive() for thread in own._threads)
    np.testing.assert_array_equal(norm(q, threads=4), expected)


SCRIPT = """
import atexit, multiprocessing, os, time, warnings
import numpy as np, fxp_layernorm as fxp
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork where there are threads

spec = fxp.plan(fxp.LayerNorm(64), fxp.QuantParams("int8", 0.1), fxp.QuantParams("int8", 0.05))
norm = fxp.FxpLayerNorm(spec, threads=3)
q = np.random.default_rng(0).integers(-128, 128, (500, 64)).astype(np.int8)
expected = norm(q)
check = lambda: np.testing.assert_array_equal(norm(q), expected)
atexit.register(check)  # after the threads have ended, or before

start = time.process_time()
time.sleep(0.5)
idle = time.process_time() - start

child = os.fork()
if not child:
    check()
    os._exit(0)
fork = os.waitpid(child, 0)[1]
with multiprocessing.get_context("fork").Pool(1) as pool:
    forked = pool.apply(norm, (q,))
check()
print(idle < 0.25, fork, (forked == expected).all())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_idle_threads_cost_nothing_forks_work_and_the_interpreter_ends() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True 0 True\n", "")
