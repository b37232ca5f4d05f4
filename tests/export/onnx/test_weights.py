"""Codes as they were trained, in the graph's own shape: read back bit for bit by onnxruntime and by onnx's own evaluator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnxruntime")

import onnx
from onnx.reference import ReferenceEvaluator
from small_graph import made, run

from qatlas.core.error import FormatError
from qatlas.core.floats import Float
from qatlas.core.grain import Block, Group, PerChannel, PerTensor
from qatlas.core.grid import HalfStep, Sign, Ternary, Uniform
from qatlas.core.qtensor import pack_bits
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, AbsMean, MinMax
from qatlas.export.onnx import OPSETS, read, write
from qatlas.export.onnx.fitting import Kind
from qatlas.export.onnx.weights import integers

GRIDS = [Uniform(8), Uniform(8, narrow=True), Uniform(5), Uniform(4), Uniform(3), Uniform(2), Ternary(), Sign(), HalfStep(2), HalfStep(4),
         Float(2, 1)]
GRAINS = [PerTensor(), PerChannel(), PerChannel(1), Group(8), Group(24), Block(2, 8)]
draws = settings(max_examples=15, deadline=None)


def by_evaluator(path, name):
    """The weight by onnx's own evaluator, which shares no code with onnxruntime."""
    proto = onnx.load(path)
    nodes = [node for node in proto.graph.node if node.name.startswith(f"{name}.")]
    out = onnx.helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None)
    small = onnx.helper.make_graph(nodes, "w", [], [out], proto.graph.initializer)
    got = ReferenceEvaluator(onnx.helper.make_model(small, opset_imports=proto.opset_import)).run(None, {})[0]
    return torch.from_numpy(np.array(got.T if out.name.endswith(".T") else got))


@draws
@given(st.sampled_from(GRIDS), st.sampled_from(GRAINS), st.sampled_from(["int8", "int4", "int2"]),
       st.sampled_from(["linear", "gemm", "gather", "both"]), st.integers(0, 9))
def test_any_grid_any_grain_any_use(grid, grain, target, how, seed):
    import tempfile
    from pathlib import Path

    torch.manual_seed(seed)
    tensor = Quant(grid, grain, AbsMax()).quantize(torch.randn(6, 24))
    with tempfile.TemporaryDirectory() as folder:
        path = write(made(tensor, how, OPSETS[target]), Path(folder) / "m.onnx", target)
        assert torch.equal(read(path)["w.weight"], tensor.dequantize())
        if tensor.bits <= 4:
            assert torch.equal(by_evaluator(path, "w.weight"), tensor.dequantize())
        x = torch.randn(3, 24)
        if how in ("linear", "gemm"):
            assert torch.allclose(run(path, x=x), x @ tensor.dequantize().T, atol=1e-5)
        if how == "gather":
            assert torch.equal(run(path, x=torch.tensor([[5, 0]])), tensor.dequantize()[torch.tensor([[5, 0]])])


@draws
@given(st.sampled_from([8, 4, 3, 2]), st.sampled_from([True, False]), st.sampled_from([PerTensor(), PerChannel(), Group(12)]), st.integers(0, 9))
def test_a_zero_in_codes(bits, signed, grain, seed):
    import tempfile
    from pathlib import Path

    torch.manual_seed(seed)
    tensor = Quant(Uniform(bits, signed), grain, MinMax()).quantize(torch.randn(6, 24) + 0.7)
    with tempfile.TemporaryDirectory() as folder:
        path = write(made(tensor), Path(folder) / "m.onnx", "int4")
        assert torch.equal(read(path)["w.weight"], tensor.dequantize())


@pytest.mark.parametrize("grain", [PerTensor(), PerChannel(), Group(9), Block(3, 6)], ids=str)
@pytest.mark.parametrize("target", ["int8", "int4", "int2"])
def test_a_convolution(grain, target, tmp_path):
    """Groups run over the flattened inputs; 54 codes of 4 or 2 bits end within a byte."""
    torch.manual_seed(0)
    tensor = Quant(Ternary(), grain, AbsMean()).quantize(torch.randn(3, 2, 3, 3))
    path = write(made(tensor, "conv", OPSETS[target]), tmp_path / "m.onnx", target)
    assert torch.equal(read(path)["w.weight"], tensor.dequantize())
    x = torch.randn(1, 2, 5, 5)
    assert torch.allclose(run(path, x=x), torch.nn.functional.conv2d(x, tensor.dequantize()), atol=1e-5)


def test_codes_lie_before_the_product_without_a_transpose(tmp_path):
    """What engines look for; where the weight has another user too, one copy of the codes serves both."""
    tensor = Quant(Uniform(4), Group(8), AbsMax()).quantize(torch.randn(6, 24))
    nodes = [node.op_type for node in onnx.load(write(made(tensor), tmp_path / "a.onnx", "int4")).graph.node]
    assert nodes == ["DequantizeLinear", "MatMul"]
    both = onnx.load(write(made(tensor, "both"), tmp_path / "b.onnx", "int4")).graph
    assert [node.op_type for node in both.node] == ["DequantizeLinear", "Gather", "Transpose", "MatMul"]
    assert [t.name for t in both.initializer] == ["w.weight.codes", "w.weight.scale"]
    assert {a.name: a.i for a in both.node[0].attribute} == {"axis": 1, "block_size": 8}


def test_first_element_in_the_low_bits():
    codes = torch.tensor([[-2, 1, 0], [1, -1, -2]])
    want = pack_bits((codes & 3).flatten().to(torch.uint8), 2).numpy()
    assert want.tolist() == [0b01_00_01_10, 0b10_11]
    assert integers(codes, Kind(2, True, 1)).tobytes() == want.tobytes()


def test_a_type_as_small_as_the_target_allows(tmp_path):
    kinds = {}
    for target in ("int8", "int4", "int2"):
        for bits in (1, 2, 4, 8):
            tensor = Quant(Sign() if bits == 1 else Uniform(bits), PerChannel(), AbsMax()).quantize(torch.randn(6, 24))
            proto = onnx.load(write(made(tensor, opset=OPSETS[target]), tmp_path / f"{target}{bits}.onnx", target))
            kinds[target, bits] = onnx.TensorProto.DataType.Name(proto.graph.initializer[0].data_type)
    assert kinds == {**{("int8", b): "INT8" for b in (1, 2, 4, 8)}, **{("int4", b): "INT4" if b < 8 else "INT8" for b in (1, 2, 4, 8)},
                     **{("int2", b): {4: "INT4", 8: "INT8"}.get(b, "INT2") for b in (1, 2, 4, 8)}}


def test_another_models_graph_is_refused(tmp_path):
    tensor = Quant(Uniform(4)).quantize(torch.randn(6, 24))
    data = made(tensor)
    data.tensors["w.weight"] = Quant(Uniform(4)).quantize(torch.randn(24, 6))
    with pytest.raises(FormatError, match=r"w.weight has shape \(24, 6\) in the checkpoint, \(6, 24\) in the graph"):
        write(data, tmp_path / "m.onnx", "int4")
    assert not list(tmp_path.iterdir())
