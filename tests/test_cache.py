"""Start-up: what is imported when, what Numba's cache holds, and what is said about it."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
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


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a folder with a copy of the package, without what was compiled."""
    shutil.copytree(PACKAGE, tmp_path / "site" / "fxp_layernorm", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "site"


def test_numba_is_loaded_when_it_is_first_needed() -> None:
    modules = python("import sys, fxp_layernorm; print(*sys.modules)", environment(PACKAGE.parent)).split()
    assert not {"numba", "onnx", "torch", "rich", "onnxruntime"} & set(modules)


def test_an_edit_of_a_primitive_is_never_answered_from_the_cache(copy: Path, tmp_path: Path) -> None:
    env = environment(copy, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    before = python(RUN, env)
    cached = sorted((tmp_path / "cache").rglob("*.nbc"))
    assert cached
    assert python(RUN, env) == before
    assert sorted((tmp_path / "cache").rglob("*.nbc")) == cached
    source = copy / "fxp_layernorm" / "kernels" / "row_stage.py"
    text = source.read_text(encoding="utf-8")
    edited = text.replace("r = np.int64(np.sqrt(np.float64(w)))", "r = np.int64(np.sqrt(np.float64(w))) * 2")
    assert edited != text
    source.write_text(edited, encoding="utf-8")
    assert python(RUN, env) != before


def test_nor_is_an_edit_of_the_vectors(copy: Path, tmp_path: Path) -> None:
    env = environment(copy, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    python(CHECK, env)
    before = {path.name for path in (tmp_path / "cache").rglob("*.nbc")}
    with (copy / "fxp_layernorm" / "kernels" / "vectors.py").open("a", encoding="utf-8") as source:
        source.write("# an edit\n")
    python(CHECK, env)
    kernels = {path.name for path in (tmp_path / "cache").rglob("drivers.run*.nbc")}
    assert len(kernels - before) == len(kernels & before) > 0


def test_a_process_with_a_warm_cache_compiles_nothing(copy: Path, tmp_path: Path) -> None:
    env = environment(copy, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    python(RUN, env)
    misses = "from fxp_layernorm import kernels; print(sum(kernels.run.stats.cache_misses.values()))"
    assert python(RUN + "\n" + misses, env).splitlines()[-1] == "0"


def test_a_read_only_installation_works(copy: Path, tmp_path: Path) -> None:
    # a file where a folder is needed stops even root from writing there
    (copy / "fxp_layernorm" / "kernels" / "__pycache__").touch()
    home = tmp_path / "home"
    home.mkdir()
    python(CHECK, environment(copy, HOME=str(home), XDG_CACHE_HOME=str(home)))
    assert list(home.rglob("*.nbc"))


def test_without_any_writable_folder_the_kernel_is_compiled_each_time(copy: Path, tmp_path: Path) -> None:
    (copy / "fxp_layernorm" / "kernels" / "__pycache__").touch()
    home = tmp_path / "home"
    home.touch()
    python(CHECK, environment(copy, HOME=str(home), XDG_CACHE_HOME=str(home)))


def test_a_compilation_is_announced_on_a_terminal_only(tmp_path: Path) -> None:
    env = environment(PACKAGE.parent, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    main, terminal = pty.openpty()
    for expected in (["fxp-layernorm: compiling the kernel for int8 -> int8, once"], []):
        subprocess.run([sys.executable, "-c", CHECK], env=env, stderr=terminal, check=True)
        os.write(terminal, b"end\n")
        seen = b""
        while b"end" not in seen:
            seen += os.read(main, 4096)
        assert seen.decode().split("\r\n")[:-2] == expected
    os.close(terminal)
    os.close(main)
