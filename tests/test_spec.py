"""Spec files: exact round trips, and a sentence for whatever is not exactly as it must be."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import KINDS, LANES, PAIRINGS, exponents_of, layer_of, params_of
from specs import specs

from fxp_layernorm import (
    DType,
    InputError,
    LayerNorm,
    LayerNormSpec,
    NormKind,
    SpecFileError,
    __version__,
    files,
    plan,
)

Document = dict[str, Any]


@pytest.fixture
def spec() -> LayerNormSpec:
    qi, qo = params_of("int8", exponents=exponents_of(6, 2)), params_of("int8", exponents=exponents_of(6, 1))
    return plan(layer_of(NormKind.LAYERNORM, 6), qi, qo)


@pytest.fixture
def path(spec: LayerNormSpec, tmp_path: Path) -> Path:
    path = tmp_path / "ln.json"
    spec.save(path)
    return path


def edit(path: Path, change: Callable[[Document], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("source", "target"), PAIRINGS[::3])
def test_round_trip_is_exact(source: DType, target: DType, kind: NormKind, lane: int, tmp_path: Path) -> None:
    """Every field to the last bit, gammas and scales without short decimals included, and the same file again."""
    n = 40
    layer = layer_of(kind, n, gamma=2.0, eps=1 / 3e5)
    spec = plan(layer, params_of(source, exponents=exponents_of(n, 3)), params_of(target, 1e3 / 7), lane=lane)
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    spec.save(first)
    loaded = LayerNormSpec.load(first)
    assert loaded == spec
    assert loaded.excess == spec.excess
    assert [type(value) for value in loaded.G] == [int] * n
    loaded.save(str(second))
    assert second.read_bytes() == first.read_bytes()


@settings(max_examples=30)
@given(specs(st.integers(1, 30)))
def test_every_field_makes_the_round_trip(spec: LayerNormSpec) -> None:
    """Of random specs with all there is: sums, accumulators, scales a channel, eps outside, narrow ranges."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ln.json"
        spec.save(path)
        loaded = LayerNormSpec.load(path)
    assert repr(loaded) == repr(spec)
    assert loaded.excess == spec.excess


def test_extreme_floats_make_the_round_trip(tmp_path: Path) -> None:
    layer = LayerNorm(6, eps=5e-324)
    layer.weight = np.array([5e-324, -0.0, 0.1, 1e-300, math.pi, 1.0 + 2.0**-52])
    layer.bias = np.array([-0.0, 0.3, -1e-310, 1 / 3, -2.5, 1e-5])
    spec = plan(layer, params_of("int8"), params_of("int8"))
    spec.save(tmp_path / "ln.json")
    loaded = LayerNormSpec.load(tmp_path / "ln.json")
    assert repr(loaded) == repr(spec)  # == takes -0.0 for 0.0


def test_the_file_is_readable_and_names_its_schema_and_producer(path: Path, spec: LayerNormSpec) -> None:
    text = path.read_text()
    document = json.loads(text)
    assert document["schema_version"] == 1
    assert document["producer"] == f"fxp-layernorm {__version__}"
    assert document["input"] == {
        "dtype": "int8",
        "scale": spec.input.scale,
        "zero_point": spec.input.zero_point,
        "exponents": list(spec.input.exponents or ()),
        "channel_scales": None,
        "narrow_range": False,
    }
    assert f'"G": [ {", ".join(map(str, spec.G))} ]' in text  # a list to a line
    assert text.endswith("}\n")


def test_saving_twice_gives_identical_bytes(path: Path, spec: LayerNormSpec) -> None:
    before = path.read_bytes()
    spec.save(path)
    assert path.read_bytes() == before


def test_a_reader_of_the_old_file_keeps_it_whole(path: Path) -> None:
    """The new file takes its name, not its bytes."""
    before = path.read_text()
    with path.open() as reader:
        plan(LayerNorm(3), params_of("int8"), params_of("int16")).save(path)
        assert reader.read() == before
    assert LayerNormSpec.load(path).n == 3


def test_saved_files_have_the_usual_permissions(path: Path) -> None:
    plain = path.with_name("plain")
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


EDITS: dict[str, tuple[Callable[[Document], Any], str]] = {
    "a later schema": (lambda d: d.update(schema_version=2), "has the schema version 2; .* reads 1"),
    "no schema": (lambda d: d.pop("schema_version"), "has the schema version None"),
    "a schema in text": (lambda d: d.update(schema_version="1"), "has the schema version '1'"),
    "a schema that is true": (lambda d: d.update(schema_version=True), "has the schema version True"),
    "a schema that is a float": (lambda d: d.update(schema_version=1.0), r"has the schema version 1\.0"),
    "an unknown key": (lambda d: d.update(surprise=1), "surprise"),
    "an unknown key inside": (lambda d: d["input"].update(surprise=1), r"input\.surprise"),
    "a missing key": (lambda d: d.pop("K"), "K: Field required"),
    "a missing key inside": (lambda d: d["output"].pop("scale"), r"output\.scale: Field required"),
    "text for an integer": (lambda d: d.update(K="21"), "K: .*valid integer"),
    "a float for an integer": (lambda d: d.update(K=21.5), "K: .*valid integer"),
    "a whole float for an integer": (lambda d: d.update(s2=22.0), "s2: .*valid integer"),
    "true for an integer": (lambda d: d.update(h=True), "h: .*valid integer"),
    "null for an integer": (lambda d: d.update(m=None), "m: .*valid integer"),
    "text for a float": (lambda d: d.update(eps="1e-5"), "eps: .*valid number"),
    "true for a float": (lambda d: d.update(eps=True), "eps: .*valid number"),
    "a number for a list": (lambda d: d.update(G=3), "G: .*valid array"),
    "text in a list": (lambda d: d["B"].__setitem__(2, "0"), r"B\.2: .*valid integer"),
    "a short list": (lambda d: d["G"].pop(), "G has 5 elements; the spec normalizes 6"),
    "another shape": (lambda d: d.update(normalized_shape=[2, 2]), "the spec normalizes 4"),
    "another kind": (lambda d: d.update(kind="batchnorm"), "kind: .*'layernorm' or 'rmsnorm'"),
    "another type": (lambda d: d["input"].update(dtype="int1"), r"input\.dtype: .*'int32'"),
    "another lane": (lambda d: d.update(lane=16), "the lane is 16"),
    "NaN": (lambda d: d.update(eps=math.nan), "finite"),
    "an infinite gamma": (lambda d: d["gamma"].__setitem__(0, math.inf), "finite"),
    "an integer without end": (lambda d: d.update(eps=10**400), "(finite|eps: Input should be a valid number)"),
    "a negative eps": (lambda d: d.update(eps=-1e-5), "not negative"),
    "a scale of NaN": (lambda d: d["input"].update(scale=math.nan), "the scale is nan"),
    "an infinite scale": (lambda d: d["output"].update(scale=math.inf), "the scale is inf"),
    "a scale of 0": (lambda d: d["input"].update(scale=0.0), r"the scale is 0\.0"),
    "a negative scale": (lambda d: d["output"].update(scale=-0.05), r"the scale is -0\.05"),
    "a subnormal scale": (lambda d: d["output"].update(scale=1e-40), "the scale is 1e-40"),
    "a zero point beyond the codes": (lambda d: d["output"].update(zero_point=128), "the zero point is 128"),
    "a channel's zero point beyond the codes": (
        lambda d: d["input"].update(zero_point=[0, 1, 2, 3, 4, -129]),
        "a channel's zero point is -129",
    ),
    "zero points of other channels": (
        lambda d: d["output"].update(zero_point=[0, 1], exponents=None),
        "parameters for 2 channels",
    ),
    "zero points and exponents of other channels": (
        lambda d: d["input"].update(zero_point=[0, 1], exponents=[1] * 6),
        "of different numbers: 6, 2",
    ),
    "a zero point that is no integer": (lambda d: d["input"].update(zero_point=[0, 0.5] * 3), "zero_point"),
    "a zero point in letters": (lambda d: d["output"].update(zero_point="1"), "zero_point"),
    "an exponent beyond its range": (lambda d: d["input"].update(exponents=[16] * 6), "a channel exponent is 16"),
    "a negative exponent": (lambda d: d["output"].update(exponents=[-1] * 6), "a channel exponent is -1"),
    "exponents of other channels": (lambda d: d["output"].update(exponents=[1] * 5), "parameters for 5 channels"),
    "a K that breaks the lane": (lambda d: d.update(K=30), "don't fit a lane of 24 bits"),
    "a shift that breaks the output": (lambda d: d.update(s2=29), "before their shift, beyond 32 bits"),
    "a gain that breaks the output": (lambda d: d["G"].__setitem__(3, 1 << 31), "before their shift, beyond 32 bits"),
    "a gain beyond every float": (lambda d: d["G"].__setitem__(3, 10**400), "before their shift, beyond 32 bits"),
    "an offset that breaks the output": (lambda d: d["B"].__setitem__(0, -(1 << 62)), "before their shift, beyond 32"),
    "an eps that breaks V": (lambda d: d.update(E=(1 << 62) - 1), "beyond 62 bits"),
    "a hostile E": (lambda d: d.update(E=10**4000), r"E is 10{100,}\[\.\.\.\]0{50,}; it must be from 0 to \d+$"),
    "codes that break V": (lambda d: d["input"].update(dtype="int16"), "V is up to .*, beyond 62 bits"),
    "a size beyond the memory": (lambda d: d.update(normalized_shape=[10**18]), "the spec normalizes 10{18}"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_file_is_refused(name: str, path: Path) -> None:
    change, words = EDITS[name]
    edit(path, change)
    with pytest.raises(SpecFileError, match=f"ln.json.*{words}"):
        LayerNormSpec.load(path)


#: The same for a spec with a second operand, a sum and an eps outside the root.
FUSED_EDITS: dict[str, tuple[Callable[[Document], Any], str]] = {
    "no adder": (lambda d: d.update(adder=None), "the inputs need an adder"),
    "no residual": (lambda d: d.update(residual=None), "multipliers for each of 1 operands"),
    "no sum": (lambda d: d.update(sum_output=None), "go together"),
    "another scale of the sum": (lambda d: d["sum_output"].update(scale=0.07), "sum_output has the scale 0.07"),
    "another scale of the adder": (lambda d: d["adder"].update(scale=0.07), "sum_output has the scale"),
    "another shift": (lambda d: d["adder"].update(sum_shift=1), "sum_output has the scale"),
    "a shift in text": (lambda d: d["adder"].update(shift="3"), r"adder\.shift: .*valid integer"),
    "a number for a multiplier": (lambda d: d["adder"].update(multipliers=[3, 4]), r"adder\.multipliers\.0: .*array"),
    "a multiplier that is a float": (lambda d: d["adder"].update(multipliers=[[1.5], [1]]), "valid integer"),
    "a hostile multiplier": (lambda d: d["adder"].update(multipliers=[[10**300], [1]]), "beyond 31 bits and sign"),
    "an unknown key of the adder": (lambda d: d["adder"].update(surprise=1), r"adder\.surprise"),
    "another A": (lambda d: d.update(A=d["A"] + 1), "it must be n \\* eps in units of u, rounded"),
    "no A": (lambda d: d.update(A=0), "A is 0 with l = .*; it must be n \\* eps"),
    "a short A": (lambda d: d.update(A=d["A"] >> 1, l=d["l"] - 1), "A is .*; it must have m = "),
    "another l": (lambda d: d.update(l=d["l"] + 1), "it must be n \\* eps in units of u, rounded"),
    "an l without end": (lambda d: d.update(l=10**9), "l is 1000000000; it must be from"),
    "another eps": (lambda d: d.update(eps=d["eps"] * 1.01), "it must be n \\* eps in units of u, rounded"),
    "an eps that is 0": (lambda d: d.update(eps=0.0), "it must be n \\* eps in units of u, rounded"),
    "eps inside": (lambda d: d.update(eps_outside=False), "where eps is outside the root, else be 0"),
    "an E too": (lambda d: d.update(E=5), "eps is outside the root, where E and h must be 0"),
    "axes in another order": (lambda d: d.update(axes=[-1, -2]), "the axes are"),
    "axes from the front": (lambda d: d.update(axes=[0]), "the axes are"),
    "no axes": (lambda d: d.update(axes=[]), "the axes are"),
    "an accumulator too narrow": (lambda d: d.update(accumulator=20), "before their shift, beyond 20 bits"),
    "an accumulator too wide": (lambda d: d.update(accumulator=64), "accumulator is 64; it must be from 8 to 63"),
    "a number for a flag": (lambda d: d["output"].update(narrow_range=1), r"output\.narrow_range: .*valid boolean"),
    "scales of other channels": (lambda d: d["residual"].update(channel_scales=[d["residual"]["scale"]]), "1 channels"),
    "channel scales without their largest": (
        lambda d: d["input"].update(channel_scales=[1e-3] * 6), "the scale must be the largest of them"
    ),
    "exponents and scales": (
        lambda d: d["input"].update(exponents=[1] * 6, channel_scales=[d["input"]["scale"]] * 6), "go without exponents"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED_EDITS)
def test_an_edited_file_of_a_sum_is_refused(name: str, path: Path) -> None:
    change, words = FUSED_EDITS[name]
    layer = LayerNorm(6, 1e-3, eps_outside=True)
    plan(
        layer, params_of("int8"), params_of("int8"), residual=params_of("int8", 3.0), sum_output=params_of("int8", 9.0)
    ).save(path)
    edit(path, change)
    with pytest.raises(SpecFileError, match=f"ln.json.*{words}"):
        LayerNormSpec.load(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON, or is cut short"),
        ("{", "is not JSON, or is cut short"),
        ("scale: 0.05", "is not JSON"),
        ("[]", "holds a list; an object with a schema_version is expected"),
        ("3", "holds a int"),
        ("null", "holds a NoneType"),
        ('"{}"', "holds a str"),
        ("{}", "has the schema version None"),
        ("[" * 100_000, "is not JSON, or is cut short"),
        ('{"schema_version": 1, "m": ' + "[" * 300 + "]" * 300 + "}", "ln.json"),
        ('{"schema_version": 1, "m": ' + "9" * 5000 + "}", "is not JSON"),
        ("\ufeff{}", "is not JSON"),
    ],
    ids=lambda value: value[:12],
)
def test_what_is_no_spec_is_refused(text: str, words: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SpecFileError, match=words):
        LayerNormSpec.load(path)


def test_a_file_that_is_no_text_is_refused(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(SpecFileError, match="is not JSON"):
        LayerNormSpec.load(path)


def test_a_key_that_is_given_twice_is_refused(path: Path) -> None:
    """JSON parsers keep the last one; a reviewer may have read the first."""
    path.write_text(path.read_text().replace('"lane": 24', '"lane": 32,\n "lane": 24'))
    with pytest.raises(SpecFileError, match="given twice"):
        LayerNormSpec.load(path)


def test_a_truncated_file_is_refused_wherever_it_ends(path: Path) -> None:
    text = path.read_text().rstrip()
    for end in range(0, len(text), 7):
        path.write_text(text[:end])
        with pytest.raises(SpecFileError, match="is not JSON, or is cut short"):
            LayerNormSpec.load(path)


def test_files_that_cannot_be_read_or_written(spec: LayerNormSpec, path: Path) -> None:
    with pytest.raises(SpecFileError, match=r"missing\.json can't be read: No such file"):
        LayerNormSpec.load(path.with_name("missing.json"))
    with pytest.raises(SpecFileError, match="can't be read: Is a directory"):
        LayerNormSpec.load(path.parent)
    with pytest.raises(InputError, match=r"x\.json can't be written: No such file"):
        spec.save(path.parent / "nowhere" / "x.json")
    with pytest.raises(InputError, match="is a folder; name a file"):
        spec.save(path.parent)
    with pytest.raises(InputError, match=r"x\.json can't be written: Not a directory"):
        spec.save(path / "x.json")
    with pytest.raises(InputError, match="can't be written: File name too long"):
        spec.save(path.with_name("x" * 300))
    assert os.listdir(path.parent) == ["ln.json"]


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (OSError(28, "No space left on device"), InputError, r"ln\.json can't be written: No space left on device"),
        (KeyboardInterrupt("stopped"), KeyboardInterrupt, "stopped"),
    ],
)
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    error: BaseException,
    expected: type[BaseException],
    words: str,
    spec: LayerNormSpec,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It fails half way through the writing."""
    before = path.read_bytes()

    def write_half(self: Path, text: str, **arguments: Any) -> int:
        self.write_bytes(text[: len(text) // 2].encode())
        raise error

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(expected, match=words):
        spec.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["ln.json"]


def test_atomic_path_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    with files.atomic_path(target) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == target.parent
        assert not target.exists()
    assert target.read_text() == "whole"
    assert os.listdir(tmp_path) == ["out.txt"]


def test_only_files_are_written(spec: LayerNormSpec, tmp_path: Path) -> None:
    """Not even for root does a device or a folder give way to a file; a link keeps pointing where it points."""
    places = [(tmp_path, "folder")]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        places.append((tmp_path / "pipe", "device"))
    for place, kind in places:
        with pytest.raises(InputError, match=f"is a {kind}; name a file"):
            spec.save(place)
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "target.json")
    spec.save(link)
    assert link.is_symlink()
    assert LayerNormSpec.load(tmp_path / "target.json") == spec
