"""MatMulNBits: trained codes in another layout, back bit for bit through the kernels of onnxruntime and OpenVINO; what has no place is refused."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnxruntime")

import onnx
from small_graph import made, run

from qatlas.core.error import FormatError
from qatlas.core.floats import Float
from qatlas.core.grain import Block, Group, PerChannel, PerTensor
from qatlas.core.grid import HalfStep, Sign, Ternary, Uniform
from qatlas.core.qtensor import unpack_bits
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, MinMax
from qatlas.export.onnx import ENGINES, fit, plan, read, types, why_not, write

GRIDS = [Uniform(8), Uniform(8, False), Uniform(6), Uniform(4), Uniform(4, narrow=True), Uniform(4, False), Uniform(3), Uniform(2), Uniform(2, False),
         Ternary(), Sign(), HalfStep(2), Float(2, 1)]
GRAINS = [PerTensor(), PerChannel(), Group(16), Group(48), Block(2, 16), Block(3, 48)]
KINDS = ["int8-matmulnbits", "int4-matmulnbits", "int2-matmulnbits", "int4-matmulnbits-weights"]
HERE = [engine for engine in ENGINES if engine.NAME == "onnxruntime" or find_spec("openvino")]
draws = settings(max_examples=12, deadline=None)


def quantized(quant, shape=(6, 48), shift=0.0):
    torch.manual_seed(0)
    return quant.quantize(torch.randn(shape) + shift)


@draws
@given(st.sampled_from(GRIDS), st.sampled_from(GRAINS), st.sampled_from(KINDS), st.sampled_from(["linear", "gemm"]), st.sampled_from(HERE))
def test_any_grid_any_grain(grid, grain, target, how, engine):
    tensor = quantized(Quant(grid, grain, AbsMax()))
    with tempfile.TemporaryDirectory() as folder:
        path = write(made(tensor, how), Path(folder) / "m.onnx", target)
        assert [node.op_type for node in onnx.load(path).graph.node] == ["MatMulNBits"]
        assert torch.equal(read(path, engine)["w.weight"], tensor.dequantize())
        x = torch.randn(3, 48)
        assert torch.allclose(run(path, x=x), x @ tensor.dequantize().T, atol=1e-4)


@draws
@given(st.sampled_from([8, 5, 4, 3, 2]), st.sampled_from([True, False]), st.sampled_from(GRAINS), st.sampled_from(KINDS), st.sampled_from(HERE))
def test_a_zero_in_codes(bits, signed, grain, target, engine):
    quant = Quant(Uniform(bits, signed), grain, MinMax())
    tensor = quantized(quant, shift=0.7)
    with tempfile.TemporaryDirectory() as folder:
        path = write(made(tensor), Path(folder) / "m.onnx", target)
        assert torch.equal(read(path, engine)["w.weight"], tensor.dequantize())


@pytest.mark.parametrize("inputs, block", [(24, 16), (40, 16), (48, 16), (64, 64), (96, 32), (512, 256)])
@pytest.mark.parametrize("engine", HERE, ids=lambda engine: engine.NAME)
def test_rows_that_no_block_divides(inputs, block, engine, tmp_path):
    """One step a channel goes with any width; more inputs than one piece of the identity has."""
    tensor = quantized(Quant(Uniform(4), PerChannel(), AbsMax()), (5, inputs))
    path = write(made(tensor), tmp_path / "m.onnx", "int4-matmulnbits")
    facts = {a.name: a.i for a in onnx.load(path).graph.node[0].attribute}
    assert facts == {"K": inputs, "N": 5, "bits": 4, "block_size": block, "accuracy_level": 1}
    assert torch.equal(read(path, engine)["w.weight"], tensor.dequantize())


def test_more_inputs_than_rows_of_the_identity_at_a_time(tmp_path):
    tensor = quantized(Quant(Uniform(4), Group(32), AbsMax()), (3, 1056))
    assert torch.equal(read(write(made(tensor), tmp_path / "m.onnx", "int4-matmulnbits"))["w.weight"], tensor.dequantize())


def test_the_layout_by_hand(tmp_path):
    """Codes of a block in one row of bytes, first in the low bits; steps and zeros a block each; no zeros where they are the middle."""
    tensor = quantized(Quant(Uniform(4), Group(16), AbsMax()))
    parts = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(write(made(tensor), tmp_path / "a.onnx", "int4-matmulnbits")).graph.initializer}
    assert {name: part.shape for name, part in parts.items()} == {"w.weight.codes": (6, 3, 8), "w.weight.scale": (6, 3)}
    assert torch.equal(unpack_bits(torch.from_numpy(parts["w.weight.codes"].copy()), 4, (6, 3, 16)).reshape(6, 48), tensor.codes)
    assert torch.equal(torch.from_numpy(parts["w.weight.scale"].copy()), tensor.scale)
    tensor = quantized(Quant(Uniform(4, False), Group(16), MinMax()))
    parts = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(write(made(tensor), tmp_path / "b.onnx", "int4-matmulnbits")).graph.initializer}
    assert parts["w.weight.zero"].shape == (6, 2)
    assert torch.equal(unpack_bits(torch.from_numpy(parts["w.weight.zero"].copy()), 4, (6, 3)).float(), tensor.zero)


@pytest.mark.parametrize("how, ops", [("both", ["DequantizeLinear", "Gather", "Transpose", "MatMul"]), ("gather", ["DequantizeLinear", "Gather"])])
def test_what_is_no_product_alone_stays_one_copy(how, ops, tmp_path):
    tensor = quantized(Quant(Uniform(2), PerChannel(), AbsMax()))
    path = write(made(tensor, how), tmp_path / "m.onnx", "int2-matmulnbits")
    proto = onnx.load(path)
    assert [node.op_type for node in proto.graph.node] == ops and types(path) == {"INT4": 1}, "INT2 would need opset 25"
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 21}
    assert torch.equal(read(path)["w.weight"], tensor.dequantize())


def test_a_convolution_stays_a_convolution(tmp_path):
    tensor = quantized(Quant(Ternary(), PerChannel(), AbsMax()), (3, 2, 3, 3))
    path = write(made(tensor, "conv"), tmp_path / "m.onnx", "int2-matmulnbits")
    assert types(path) == {"INT4": 1} and torch.equal(read(path)["w.weight"], tensor.dequantize())


@pytest.mark.parametrize("grain", [Group(8), Group(24), Block(2, 8), PerChannel(1)], ids=str)
def test_a_step_that_serves_no_block_is_refused(grain, tmp_path):
    quant = Quant(Uniform(4), grain, AbsMax())
    with pytest.raises(FormatError, match=r"no place in MatMulNBits.*\n.*hold these numbers: onnx:int8, onnx:int8-weights, onnx:int4, "):
        fit(quant, "int4-matmulnbits", (6, 48))
    with pytest.raises(FormatError, match=r"cannot hold w.weight: .*no place in MatMulNBits"):
        write(made(quantized(quant)), tmp_path / "m.onnx", "int4-matmulnbits")
    assert not list(tmp_path.iterdir()) and why_not(quant, "int4-matmulnbits", (4, 2, 4, 6)) is None, "a convolution takes any"


def test_plan_and_types(tmp_path):
    data = made(quantized(Quant(Uniform(2), PerChannel(), AbsMax())))
    assert plan(data, "int2-matmulnbits") == {"w.weight": "INT2"}
    path = write(data, tmp_path / "m.onnx", "int2-matmulnbits")
    assert types(path) == {"MatMulNBits of 2 bits": 1}
    assert {entry.domain: entry.version for entry in onnx.load(path).opset_import} == {"": 21, "com.microsoft": 1}


@pytest.mark.parametrize("name, value", [("K", 2**40), ("N", 7), ("bits", 8), ("block_size", 0)])
def test_a_node_that_does_not_belong_to_its_codes(name, value, tmp_path):
    path = write(made(quantized(Quant(Uniform(4), Group(16)))), tmp_path / "m.onnx", "int4-matmulnbits")
    proto = onnx.load(path)
    next(a for a in proto.graph.node[0].attribute if a.name == name).i = value
    onnx.save(proto, path)
    with pytest.raises(FormatError, match=rf"w.weight.product says .*{name}={value}.* codes have the shape \[6, 3, 8\]"):
        read(path)


def test_another_models_graph(tmp_path):
    data = made(quantized(Quant(Uniform(4))))
    data.tensors["w.weight"] = quantized(Quant(Uniform(4)), (48, 6))
    with pytest.raises(FormatError, match=r"w.weight has shape \(48, 6\)"):
        write(data, tmp_path / "m.onnx", "int4-matmulnbits")
