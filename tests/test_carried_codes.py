"""Codes that int32 carries in whole models, for accelerators that have no signed tensors of 8 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from onnx import TensorProto
from onnx_models import feeds, model_with_norms, run_onnxruntime, run_reference
from test_bodies import NODE, data, model_of, norm
from test_qdq import Block
from test_qdq_residual import Residual
from test_verify import doubled, sabotage

from fxp_layernorm import ModelError, export
from fxp_layernorm.calibration import calibrate_model, quantized_norms
from fxp_layernorm.cli import main
from fxp_layernorm.runtime import Feeds

FORMS = pytest.mark.parametrize("form", ["inline", "function"])
NARROW: dict[str, Any] = {"hardware": "carried24", "exponents": 0}
WORDS = pytest.mark.parametrize(("word", "options"), [("int64", {}), ("int24", NARROW), ("float24", NARROW)])
SIGNED = {ir.DataType.INT8, ir.DataType.INT16}
#: One zero point for all channels: the border is a QuantizeLinear, of unsigned codes.
SHARED: dict[str, Any] = {"symmetric": True, "exponents": 0}


def types_of(model: onnx.ModelProto) -> set[ir.DataType | None]:
    """Return the types of all values of a model and its functions' bodies."""
    onnx.checker.check_model(model, full_check=True)
    loaded = ir.from_proto(onnx.shape_inference.infer_shapes(model, data_prop=True))
    casts = {ir.DataType(node.attributes["to"].as_int()) for node in nodes_of(loaded) if node.op_type == "Cast"}
    return casts | {value.dtype for node in loaded.graph for value in (*node.inputs, *node.outputs) if value}


def nodes_of(model: ir.Model) -> list[ir.Node]:
    return [*model.graph, *(node for function in model.functions.values() for node in function)]


@FORMS
@WORDS
def test_no_tensor_has_signed_codes_of_8_bits(word: str, options: dict[str, Any], form: str) -> None:
    model = model_with_norms()
    params = calibrate_model(model, Feeds(feeds()), **options)
    exported = export.quantize_model(model, params, form=form, word=word, io="int32")
    assert not types_of(exported) & SIGNED
    assert types_of(export.quantize_model(model, params, form=form, word=word)) & SIGNED
    result = export.verify(model, exported, params, Feeds(feeds()))
    assert result.exact
    assert result.codes == sum(2 * feed["x"].size for feed in feeds())
    own = run_onnxruntime(export.quantize_model(model, params, form=form, word=word), feeds()[0])
    for carried, wanted in zip(run_onnxruntime(exported, feeds()[0]), own, strict=True):
        np.testing.assert_array_equal(carried, wanted)


def test_the_fused_residual_and_its_sum_are_carried_too() -> None:
    model = model_of(
        "h = Mul(x, weight) t = Tanh(h) s0 = Add(h, t) "
        + norm(NODE, "s0", "o") + "n1 = Tanh(o) s1 = Add(s0, n1) " + norm(NODE, "s1", "y", 1)
    )  # fmt: skip
    params = calibrate_model(model, Feeds(data()), fuse_residual=True)
    assert params.norms[0].spec.sum_output is not None
    exported = export.quantize_model(model, params, form="inline", io="int32")
    assert not types_of(exported) & SIGNED
    assert export.verify(model, exported, params, Feeds(data())).exact


@pytest.mark.parametrize(
    ("types", "opset"), [(("int8", "uint8"), 17), (("uint8", "int8"), 17), (("int16", "uint16"), 21)]
)
def test_quantizers_give_unsigned_codes(types: tuple[str, str], opset: int) -> None:
    """Of which accelerators have casts, and which are one addition from the signed ones."""
    model = model_with_norms(opset=opset, ir_version=10)
    params = calibrate_model(model, Feeds(feeds()), *types, **SHARED)
    exported = export.quantize_model(model, params, form="inline", io="int32")
    operators = [node.op_type for node in exported.graph.node]
    assert operators.count("QuantizeLinear") == 2
    assert "Round" not in operators
    assert not types_of(exported) & SIGNED
    outside = [{"x": feed["x"] * 9} for feed in feeds()]  # beyond both ends of the codes
    assert export.verify(model, exported, params, Feeds(outside)).exact


@FORMS
@pytest.mark.parametrize("block", [Block(dtype="uint8"), Residual("int16")], ids=["norm", "with the residual"])
def test_codes_that_are_the_models_keep_their_type(block: Block | Residual, form: str) -> None:
    model = block.model()
    feed = block.feed() if isinstance(block, Residual) else {"q": block.codes()}
    params = quantized_norms(model).params
    exported = export.quantize_model(model, params, form=form, io="int32")
    onnx.checker.check_model(exported, full_check=True)
    assert [value.type for value in exported.graph.output] == [value.type for value in model.graph.output]
    assert export.verify(model, exported, params, Feeds(feed)).exact
    own = run_onnxruntime(export.quantize_model(model, params), feed)
    for carried, wanted in zip(run_onnxruntime(exported, feed), own, strict=True):
        np.testing.assert_array_equal(carried, wanted)
    # the norm itself knows int32 alone
    loaded = export.load_model(exported)
    places = export.exported_norms(loaded)
    values = ir.convenience.create_value_mapping(loaded.graph)
    for place in places:
        cast = values[place.codes_out].producer()
        assert cast is not None
        assert (cast.op_type, cast.inputs[0] and cast.inputs[0].dtype) == ("Cast", ir.DataType.INT32)


@FORMS
def test_stages_are_named_behind_the_casts(form: str) -> None:
    block = Residual()
    model, feed = block.model(), block.feed()
    params = quantized_norms(model).params
    exported = export.quantize_model(model, params, form=form, io="int32")
    sabotage(exported, "R", doubled)
    check = export.verify(model, exported, params, Feeds(feed)).norms[1]
    assert check.stage is not None
    assert check.stage.stage == "R"


@pytest.mark.parametrize("word", ["int24", "float24"])
def test_what_another_consumer_gives_is_held(word: str) -> None:
    model = model_with_norms()
    params = calibrate_model(model, Feeds(feeds()), **NARROW)
    exported = export.quantize_model(model, params, form="inline", word=word, io="int32")
    probe = export.probe(exported)
    names = [value.name for value in probe.graph.output]
    kinds = {value.name: value.type.tensor_type.elem_type for value in probe.graph.output}
    assert kinds["norm0/codes_in"] == kinds["norm0/codes_out"] == TensorProto.INT32
    results = [dict(zip(names, run_reference(probe, feed), strict=True)) for feed in feeds()]
    assert export.verify(model, exported, params, Feeds(feeds()), results=Feeds(results)).exact
    results[0]["norm1/codes_out"] = results[0]["norm1/codes_out"] ^ 1
    assert not export.verify(model, exported, params, Feeds(feeds()), results=Feeds(results)).passed


def test_what_has_no_such_codes() -> None:
    model = model_with_norms()
    params = calibrate_model(model, Feeds(feeds()))
    with pytest.raises(ModelError, match="io is 'int16'; it can be int32"):
        export.quantize_model(model, params, io="int16")
    with pytest.raises(ModelError, match="the form qdq has the codes of QuantizeLinear; leave out --io"):
        export.quantize_model(model, params, form="qdq", io="int32")


def test_command_line(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("model.onnx", "out.onnx", "params.json", "data.npz")]
    model, out, params, feed = map(str, files)
    onnx.save(model_with_norms(), model)
    np.savez(feed, **feeds()[0])

    def run(*arguments: str) -> Any:
        result = CliRunner().invoke(main, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    run("calibrate", model, "--data", feed, "-o", params)
    assert run("export", model, params, "-o", out, "--io", "int32")["io"] == "int32"
    assert not types_of(onnx.load(out)) & SIGNED
    assert run("verify", model, out, params, "--data", feed)["exact"]
