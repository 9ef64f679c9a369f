"""The benchmark of docs/targets.md: its runner on the consumers that are installed, and how it tells their answers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from targets.__main__ import CONSUMERS, FORMS, LENGTHS, OPSETS, OTHERS, WORDS, Answers, Case, rows_of_page, run, shorten
from targets.consumer import MODULES


def installed(name: str) -> bool:
    modules = {module.partition(".")[0] for module in MODULES.get(name, (name,))}
    return all(importlib.util.find_spec(module) for module in modules) and (name != "emx" or _has("emx_onnx_cgen"))


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


#: What is not exact, as docs/targets.md tells.
INEXACT = {
    ("openvino", "int64"), ("tract", "int64"), ("qnn", "int64"), ("qnn", "float24"),
    *(("qnn_alone", word) for word in WORDS),
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", CONSUMERS)
def test_consumers_give_the_reference_codes(name: str, word: str) -> None:
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    if (name, word) in INEXACT:
        pytest.skip("not exact")
    cases = [Case(word, "inline", 64, 17, False), Case(word, "inline, int32 in and out", 64, 13, False)]
    found = run(name, Path(sys.executable), cases)
    assert [answers.exact for answers in found.values()] == [[case] for case in cases]


def test_a_consumer_that_ends_its_process_is_told(tmp_path: Path) -> None:
    """A model that can't be read doesn't end the run."""
    from targets.__main__ import Consumer

    consumer = Consumer("reference", Path(sys.executable))
    job = {"model": str(tmp_path / "none.onnx"), "inputs": str(tmp_path / "none.npz"), "outputs": str(tmp_path / "y")}
    error = consumer.run({**job, "seconds": 30})
    consumer.close()
    assert error is not None
    assert "none.npz" in error


def test_answers_are_told_in_few_words() -> None:
    def cases(dynamic: tuple[bool, ...] = (False, True), opsets: tuple[int, ...] = OPSETS) -> list[Case]:
        return [Case("int24", "inline", n, o, d) for n in LENGTHS for o in opsets for d in dynamic]

    assert str(Answers(cases(), [], {})) == "exact"
    assert str(Answers([], cases(), {})) == "**wrong**"
    assert str(Answers([], [], dict.fromkeys(cases(), "no"))) == "refused: no"
    partly = Answers(cases((False,)), [], dict.fromkeys(cases((True,)), "static shapes only"))
    assert str(partly) == "exact (static); refused (dynamic): static shapes only"
    assert str(Answers(cases(opsets=(17, 21)), cases(opsets=(13,)), {})) == "exact (opset 17, 21); **wrong** (opset 13)"
    outliers = [Case("int24", "inline", 64, 17, d, OTHERS[0]) for d in (False, True)]
    assert str(Answers(cases(), outliers, {})) == "exact (plain codes); **wrong** (channel exponents)"
    assert str(Answers([*cases(), outliers[1]], outliers[:1], {})).endswith("**wrong** (channel exponents; static)")


def test_messages_are_short_and_hold_no_cell_border() -> None:
    assert shorten("in /tmp/x/m.onnx:\n a|b", "/tmp/x") == "in /m.onnx: a/b"
    assert len(shorten("long " * 100, "/tmp")) == 160


def test_rows_of_consumers_that_are_not_run_stay() -> None:
    page = "| consumer | form |\n|---|---|\n| tract 1 | a |\n|  | b |\n| tvm 2 | a |\n|  | b |\n\n| word | nodes |\n"
    assert rows_of_page(page, "tract") == ["| tract 1 | a |", "|  | b |"]
    assert rows_of_page(page, "tvm") == ["| tvm 2 | a |", "|  | b |"]
    assert rows_of_page(page, "emx") == []


def test_page_has_every_consumer_and_word() -> None:
    page = (Path(__file__).parent.parent / "docs" / "targets.md").read_text()
    for _, title in CONSUMERS.values():
        assert f"| {title}" in page
    for text in (*FORMS, *WORDS, "nodes", "time"):
        assert text in page
