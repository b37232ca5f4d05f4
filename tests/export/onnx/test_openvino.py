"""OpenVINO reads the same file: weights bit for bit; what it does not read is said and not tried."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("onnxruntime")

from small_graph import made, marked

from qatlas.core.error import FormatError
from qatlas.core.grain import Group, PerChannel, PerTensor
from qatlas.core.grid import Ternary, Uniform
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import AbsMax, Learned, MinMax
from qatlas.export.onnx import OPSETS, answers, openvino, read, write
from qatlas.model.graph import signal


def needs():
    pytest.importorskip("openvino")


def tensor(quant=None, shape=(6, 24)):
    torch.manual_seed(0)
    return (quant or Quant(Uniform(4))).quantize(torch.randn(shape) + 0.3)


@pytest.mark.parametrize("target", ["int8", "int4"])
@pytest.mark.parametrize("quant", [Quant(Uniform(4)), Quant(Uniform(3), PerTensor()), Quant(Uniform(4), Group(8)), Quant(Uniform(8)),
                                   Quant(Uniform(4), Group(8), MinMax()), Quant(Uniform(4, False), PerChannel(), MinMax()),
                                   Quant(Ternary(), PerChannel(1))], ids=str)
def test_weights_bit_for_bit(quant, target, tmp_path):
    needs()
    for how in ("linear", "gather"):
        path = write(made(tensor(quant), how), tmp_path / f"{how}.onnx", target)
        assert openvino.why_not(path) is None and torch.equal(read(path, openvino)["w.weight"], tensor(quant).dequantize())


def test_a_convolution_and_what_it_computes(tmp_path):
    needs()
    quant = Quant(Uniform(4), Group(9))
    path = write(made(tensor(quant, (3, 2, 3, 3)), "conv"), tmp_path / "m.onnx", "int4")
    assert torch.equal(read(path, openvino)["w.weight"], tensor(quant, (3, 2, 3, 3)).dequantize())
    x = torch.randn(1, 2, 5, 5)
    want = torch.nn.functional.conv2d(x, tensor(quant, (3, 2, 3, 3)).dequantize())
    assert torch.allclose(answers(path, [x], openvino), want, atol=1e-5) and torch.allclose(answers(path, [x]), want, atol=1e-5)


@pytest.mark.parametrize("bits, signed", [(8, True), (8, False), (4, True), (4, False)])
def test_values_of_activations(bits, signed, tmp_path):
    """A QuantizeLinear stays one, ties included."""
    needs()
    quantizer = Quantizer(Quant(Uniform(bits, signed), PerTensor(), Learned(AbsMax()))).initialise(torch.tensor([-1.0, 2.0]))
    with torch.no_grad():
        quantizer.scale.fill_(0.25)
    path = write(marked(signal(quantizer, "m:input"), [None]), tmp_path / "m.onnx", "int8")
    x = torch.cat([torch.arange(-140, 140) * 0.125, torch.randn(100)])
    assert torch.equal(torch.from_numpy(openvino.start(str(path))({"x": x.numpy()})[0]), quantizer(x))


def test_two_bits_are_not_asked_about(tmp_path):
    path = write(made(tensor(Quant(Ternary())), opset=OPSETS["int2"]), tmp_path / "m.onnx", "int2")
    needs()
    assert openvino.why_not(path) == "OpenVINO reads no INT2; the targets int2-matmulnbits and int4 hold these weights in types that it reads"
    with pytest.raises(FormatError, match="OpenVINO cannot load"):
        openvino.start(str(path))


def test_it_says_no_in_words(tmp_path):
    needs()
    path = write(made(tensor()), tmp_path / "m.onnx", "int4")
    with pytest.raises(FormatError, match="OpenVINO cannot run"):
        answers(path, [torch.ones(1, 7)], openvino)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FormatError, match="OpenVINO cannot load"):
        answers(path, [torch.ones(1, 24)], openvino)


def test_without_the_package(tmp_path, monkeypatch):
    path = write(made(tensor()), tmp_path / "m.onnx", "int4")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(FormatError, match=r"qatlas\[openvino\]"):
        openvino.start(str(path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "qatlas[openvino]" in openvino.why_not(path)
