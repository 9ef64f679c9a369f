"""What torch's exporters write of each spelling of a norm: found, calibrated, replaced and exact."""

from __future__ import annotations

import importlib.util
import io
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest

from fxp_layernorm import export
from fxp_layernorm.calibration import calibrate_model
from fxp_layernorm.runtime import Feeds

torch = pytest.importorskip("torch")
nn = torch.nn
N = 16


class Spelled(nn.Module):  # type: ignore[misc, name-defined]
    """A norm of the last dimension as people write it: by the name of the spelling."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        size = 5 if spelling == "channels first" else N
        self.spelling, self.a, self.b = spelling, nn.Parameter(torch.ones(size)), nn.Parameter(torch.ones(size))

    def forward(self, x: Any) -> Any:
        a, b = self.a, self.b
        axis = 1 if self.spelling == "channels first" else -1
        mean = x.mean(axis, keepdim=True)
        if self.spelling == "deviation":  # the annotated transformer's
            return a * (x - mean) / (x.std(-1, keepdim=True) + 1e-6) + b
        if self.spelling == "variance of n - 1":
            return a * (x - mean) / torch.sqrt(x.var(-1, keepdim=True) + 1e-6) + b
        if self.spelling == "variance":
            return a * (x - mean) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6) + b
        if self.spelling == "moments":
            square = (x * x).mean(-1, keepdim=True) - mean * mean
            return a * (x - mean) / torch.sqrt(square.clamp(min=0) + 1e-6) + b
        if self.spelling == "normalize":  # that of x-transformers, audio separation and video models
            return nn.functional.normalize(x, dim=-1) * N**0.5 * a
        if self.spelling == "channels first":  # ConvNeXt's
            square = (x - mean).pow(2).mean(1, keepdim=True)
            return a[:, None] * ((x - mean) / torch.sqrt(square + 1e-6)) + b[:, None]
        root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return a * (x * root) if self.spelling == "Llama" else (x.float() * root) * (1 + a)


class Normalized(nn.Module):  # type: ignore[misc, name-defined]
    """What attention by cosines has: no norm, as it has no gains."""

    def forward(self, x: Any) -> Any:
        return nn.functional.normalize(x, dim=-1) * 10


SPELLINGS = ("deviation", "variance of n - 1", "variance", "moments", "channels first", "Llama", "Gemma", "normalize")
MODULES: dict[str, Callable[[], Any]] = {
    "LayerNorm": lambda: nn.LayerNorm(N),
    "two dimensions": lambda: nn.LayerNorm((5, N)),
    "no affine": lambda: nn.LayerNorm(N, elementwise_affine=False),
    "no bias": lambda: nn.LayerNorm(N, bias=False),
    "RMSNorm": lambda: nn.RMSNorm(N),
    "one group": lambda: nn.GroupNorm(1, 5),
    "encoder": lambda: nn.TransformerEncoderLayer(N, 2, 32, batch_first=True),
    **{name: partial(Spelled, name) for name in SPELLINGS},
}
#: What only resembles a norm.
OTHERS: dict[str, Callable[[], Any]] = {
    "batch": lambda: nn.BatchNorm1d(5), "instance": lambda: nn.InstanceNorm1d(5, affine=True),
    "groups": lambda: nn.GroupNorm(5, 5), "normalize": lambda: Normalized(),
}  # fmt: skip


#: The older exporter writes all of them, LayerNorms as a node from opset 17 on; the newer one some in another way.
WRITTEN = [
    *((name, "trace", 13) for name in MODULES if name not in ("RMSNorm", "encoder")),
    *((name, "trace", 17) for name in ("LayerNorm", "two dimensions", "no affine", "no bias", "encoder")),
    ("LayerNorm", "dynamo", 18), ("RMSNorm", "dynamo", 23), ("encoder", "dynamo", 23), ("deviation", "dynamo", 18),
    ("moments", "dynamo", 18), ("one group", "dynamo", 23), ("normalize", "dynamo", 18),
]  # fmt: skip


def exported(module: Any, exporter: str, opset: int) -> onnx.ModelProto:
    if exporter == "dynamo" and importlib.util.find_spec("onnxscript") is None:
        pytest.skip("torch's newer exporter needs onnxscript")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(0.5, 1.5)
    whole, x = nn.Sequential(nn.ReLU(), module, nn.Tanh()).eval(), torch.randn(2, 5, N)
    logging.disable(logging.CRITICAL)
    try:
        if exporter == "dynamo":
            shapes = ({0: torch.export.Dim("batch")},)
            program = torch.onnx.export(
                whole, (x,), dynamo=True, opset_version=opset, input_names=["x"], dynamic_shapes=shapes, verbose=False
            )
            return program.model_proto  # type: ignore[no-any-return]
        file = io.BytesIO()
        torch.onnx.export(
            whole, (x,), file, dynamo=False, opset_version=opset, input_names=["x"], dynamic_axes={"x": {0: "batch"}}
        )
        return onnx.load_from_string(file.getvalue())
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "exporter", "opset"), WRITTEN)
def test_norms_of_torch(name: str, exporter: str, opset: int) -> None:
    module = MODULES[name]()
    model = exported(module, exporter, opset)
    found = export.find_norms(export.load_model(model))
    assert [norm.blocker for norm in found] == [None] * (2 if name == "encoder" else 1)
    if isinstance(module, nn.LayerNorm):
        (norm,) = found
        assert (norm.normalized_shape, norm.epsilon) == (module.normalized_shape, float(np.float32(1e-5)))
        for parameter, fitted, nothing in ((module.weight, "gamma", 1), (module.bias, "beta", 0)):
            wanted = nothing if parameter is None else parameter.detach().numpy().ravel()
            np.testing.assert_array_equal(getattr(norm.layer, fitted), np.broadcast_to(wanted, norm.n))
    rng = np.random.default_rng(0)
    data = Feeds([{"x": rng.normal(size=(3, 5, N)).astype(np.float32)}])
    params = calibrate_model(model, data, "int16", "int16")
    integer = export.quantize_model(model, params, form="inline", opset=None if opset > 13 else 17)
    onnx.checker.check_model(integer, full_check=True)
    result = export.verify(model, integer, params, data)
    assert result.exact
    assert result.outputs[0].cosine > 0.9999


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "exporter", "opset"), [*((name, "trace", 17) for name in OTHERS), ("groups", "dynamo", 23)]
)
def test_what_torch_has_besides(name: str, exporter: str, opset: int) -> None:
    assert export.find_norms(export.load_model(exported(OTHERS[name](), exporter, opset))) == []
