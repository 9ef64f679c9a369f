"""Start-up: what is imported when, what Numba's cache holds, and what is said about it."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import fxp_layernorm

PACKAGE = Path(fxp_layernorm.__file__).parent
CALL = """
import numpy as np, fxp_layernorm as fxp
spec = fxp.plan(fxp.LayerNorm(8), fxp.QuantParams("int8", 0.1), fxp.QuantParams("int8", 0.05))
q = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
"""
RUN = CALL + "print(fxp.FxpLayerNorm(spec)(q).tolist())"
#: The smallest kernel, which is compiled in a moment.
SERVE = "from fxp_layernorm import kernels; kernels.serve(0, 0, 1)"
CHECK = CALL + "assert (fxp.FxpLayerNorm(spec)(q) == fxp.reference.run(spec, q)).all()"


def environment(folder: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    return {**kept, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", **variables}


def python(code: str, env: dict[str, str]) -> str:
    folder = env["PYTHONPATH"]  # as -c puts the working directory before it
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@dataclass(frozen=True)
class Compiled:
    """A copy of the package that has run its kernel once, on a terminal."""

    folder: Path
    env: dict[str, str]
    printed: str
    announced: list[str]

    @property
    def cached(self) -> set[str]:
        return {path.name for path in Path(self.env["NUMBA_CACHE_DIR"]).rglob("*.nbc")}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE, folder / "fxp_layernorm", ignore=shutil.ignore_patterns("__pycache__"))
    env = environment(folder, NUMBA_CACHE_DIR=str(tmp_path_factory.mktemp("cache")))
    return Compiled(folder, env, *on_a_terminal(RUN, env))


def on_a_terminal(code: str, env: dict[str, str]) -> tuple[str, list[str]]:
    """Run code with the standard error on a terminal; return what it prints, and the lines on the terminal."""
    main, terminal = pty.openpty()
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=env, cwd=env["PYTHONPATH"], stdout=subprocess.PIPE, stderr=terminal, text=True, check=True
    )
    os.write(terminal, b"end\n")
    seen = b""
    while b"end" not in seen:
        seen += os.read(main, 4096)
    os.close(terminal)
    os.close(main)
    return done.stdout, seen.decode().split("\r\n")[:-2]


@contextmanager
def edited(path: Path, change: Callable[[str], str]) -> Iterator[None]:
    text = path.read_text(encoding="utf-8")
    assert change(text) != text
    path.write_text(change(text), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


def unwritable(folder: Path) -> None:
    """Put a file where the cache's folder would be: that stops even root from writing there."""
    shutil.copytree(PACKAGE, folder / "fxp_layernorm", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "fxp_layernorm" / "kernels" / "__pycache__").touch()


def test_numba_is_loaded_when_it_is_first_needed() -> None:
    modules = python("import sys, fxp_layernorm; print(*sys.modules)", environment(PACKAGE.parent)).split()
    assert not {"numba", "onnx", "torch", "rich", "onnxruntime"} & set(modules)


def test_a_compilation_is_announced_on_a_terminal_only(compiled: Compiled) -> None:
    """Where there is none, `python` finds nothing on the standard error, whatever is compiled."""
    assert compiled.announced == ["fxp-layernorm: compiling the kernel for int8 -> int8, once"]
    assert on_a_terminal(RUN, compiled.env) == (compiled.printed, [])


def test_a_process_with_a_warm_cache_compiles_nothing(compiled: Compiled) -> None:
    before = compiled.cached
    misses = "from fxp_layernorm import kernels; print(sum(kernels.run.stats.cache_misses.values()))"
    assert python(RUN + "\n" + misses, compiled.env) == compiled.printed + "0\n"
    assert compiled.cached == before


def test_an_edit_of_a_primitive_is_never_answered_from_the_cache(compiled: Compiled) -> None:
    def double(text: str) -> str:
        return text.replace("r = np.int64(np.sqrt(np.float64(w)))", "r = np.int64(np.sqrt(np.float64(w))) * 2")

    with edited(compiled.folder / "fxp_layernorm" / "kernels" / "row_stage.py", double):
        assert python(RUN, compiled.env) != compiled.printed


@pytest.mark.parametrize("file", ["kernels/vectors.py", "kernels/drivers.py", "team.py"])
def test_nor_is_any_other_edit(file: str, compiled: Compiled) -> None:
    before = compiled.cached
    with edited(compiled.folder / "fxp_layernorm" / file, lambda text: text + "# an edit\n"):
        python(SERVE, compiled.env)
    assert len([name for name in compiled.cached - before if name.startswith("drivers.serve")]) == 1


def test_processes_that_compile_at_once_write_files_of_their_own(compiled: Compiled, tmp_path: Path) -> None:
    """Each begins with an index that the other has not written yet."""
    env = {**compiled.env, "NUMBA_CACHE_DIR": str(tmp_path)}
    python(SERVE, env)
    (first,), (index,) = tmp_path.rglob("*.nbc"), tmp_path.rglob("*.nbi")
    index.unlink()
    python(SERVE, env)
    assert len({first, *tmp_path.rglob("*.nbc")}) == 2


def test_a_read_only_installation_works(tmp_path: Path) -> None:
    unwritable(tmp_path / "site")
    home = tmp_path / "home"
    home.mkdir()
    python(SERVE, environment(tmp_path / "site", HOME=str(home), XDG_CACHE_HOME=str(home)))
    assert list(home.rglob("drivers.serve*.nbc"))


def test_without_any_writable_folder_the_kernel_is_compiled_each_time(tmp_path: Path) -> None:
    unwritable(tmp_path / "site")
    home = tmp_path / "home"
    home.touch()
    python(CHECK, environment(tmp_path / "site", HOME=str(home), XDG_CACHE_HOME=str(home)))
