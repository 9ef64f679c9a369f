"""The README: its Python runs, its commands exist, its layout is that of the repository."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fxp_layernorm.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    bound, noise = capsys.readouterr().out.splitlines()
    assert float(re.findall(r"at most (\S+) LSB", bound)[0]) < 0.7
    assert float(re.findall(r"(\S+) dB", noise)[0]) > 30
    assert (tmp_path / "ln.json").exists()


def test_commands_and_their_options_exist() -> None:
    lines = re.findall(r"^fxp-layernorm .*$", TEXT, flags=re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        _, command, *arguments = shlex.split(line)
        assert command in COMMANDS
        parsed = main.get_command(None, command)  # type: ignore[arg-type]
        assert parsed is not None
        parsed.make_context(command, arguments, resilient_parsing=True)
        known = {option for parameter in parsed.params for option in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("-")} <= known


def test_layout_is_real() -> None:
    block = TEXT.split("## How it is built")[1].split("```")[1]
    folder = ROOT
    for line in block.strip().splitlines():
        name = line.split()[0]
        folder = ROOT if not line.startswith(" ") else ROOT / "fxp_layernorm"
        assert (folder / name).exists(), name
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (ROOT / link).exists(), link
