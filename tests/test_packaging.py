"""What a user gets: one top-level name, every module, the names of the interface, and a fast start."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fxp_layernorm as fxp

ROOT = Path(__file__).parent.parent


def test_public_names_exist() -> None:
    for name in fxp.__all__:
        assert getattr(fxp, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        fxp.no_such_name  # noqa: B018


def test_wheel_has_one_top_level_name_and_every_module(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"  # a build leaves files beside the code
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    done = subprocess.run([*pip, str(tmp_path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fxp_layernorm"}
    modules = {path.relative_to(ROOT) for path in (ROOT / "fxp_layernorm").rglob("*.py")}
    for folder in ("calibration", "export"):
        modules |= {Path("fxp_layernorm") / path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")}
    assert {str(module) for module in modules} <= names
    assert {"fxp_layernorm/py.typed", "fxp_layernorm/analysis/report.html.j2"} <= names


@pytest.mark.parametrize("absent", ["numba", "onnx", "onnxruntime", "torch", "pydantic", "rich", "click"])
def test_import_loads_only_what_it_needs(absent: str) -> None:
    code = f"import sys, fxp_layernorm; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_package_runs_as_a_module() -> None:
    run = subprocess.run([sys.executable, "-m", "fxp_layernorm", "--version"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, f"fxp-layernorm, version {fxp.__version__}\n")


def test_dependencies_point_one_way() -> None:
    """Layers from the bottom to the top; a module may import only from those below, or beside it in its own folder."""
    layers = [
        ("errors", "_version", "team", "docstrings"), ("files", "axes"), ("layer", "quantization"), ("proof",),
        ("adder",), ("spec", "hardware"), ("planner", "reference", "kernels", "arguments", "params", "exposure"),
        ("threads",), ("inference", "runtime"), ("export",), ("calibration",), ("analysis",), ("demo", "benchmark"),
        ("cli",), ("__main__",),
    ]  # fmt: skip
    rank = {name: index for index, names in enumerate(layers) for name in names}
    for path in [
        *(ROOT / "fxp_layernorm").glob("*.py"),
        *(ROOT / "fxp_layernorm" / "analysis").glob("*.py"),
        *(ROOT / "fxp_layernorm" / "kernels").glob("*.py"),
        *(ROOT / "export").glob("*.py"),
        *(ROOT / "calibration").glob("*.py"),
    ]:
        own = path.parent.name if path.parent.name in rank else path.stem
        if own == "__init__":
            continue
        for line in path.read_text().splitlines():
            if not line.startswith("from .") or line.startswith("from ._version"):
                continue
            dots, _, names = line.partition(" import ")
            module = dots.removeprefix("from ").lstrip(".").split(".")[0]
            inside = dots.startswith("from .") and not dots.startswith("from ..") and path.parent.name in rank
            for imported in [module] if module else [name.strip(" (") for name in names.split(",")]:
                if imported and not inside:
                    assert rank[imported] < rank[own], f"{path.name} imports {imported}"


def test_lowest_versions_are_the_bounds_of_pyproject() -> None:
    tested = set(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests" / "lowest.txt").read_text(), flags=re.MULTILINE))
    bounds = set(re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    named = {name for name, _ in tested}

    def release(version: str) -> tuple[int, ...]:
        return tuple(map(int, (version + ".0.0").split(".")[:3]))

    assert {(name, release(version)) for name, version in bounds if name in named} == {
        (name, release(version)) for name, version in tested
    }
