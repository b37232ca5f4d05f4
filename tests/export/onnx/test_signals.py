"""A static quantizer through onnxruntime's QuantizeLinear gives its own values, bit for bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnxruntime")

import onnx
from small_graph import marked, run

from qatlas.core.grain import PerChannel, PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import AbsMax, Learned, MinMax
from qatlas.export.onnx import unused, write
from qatlas.model.graph import signal


def quantizer(quant: Quant, step: float, zero: float | None = None) -> Quantizer:
    made = Quantizer(quant).initialise(torch.tensor([-1.0, 2.0]))
    with torch.no_grad():
        made.scale.fill_(step)
        if zero is not None:
            made.zero.fill_(zero)
    return made


def through(made: Quantizer, x: torch.Tensor, target: str = "int8") -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        return run(write(marked(signal(made, "m:input"), [None]), Path(folder) / "m.onnx", target), x=x)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 8), st.sampled_from([True, False]), st.booleans(), st.floats(2.0**-13, 8.0, width=32), st.sampled_from([None, 0.5]))
def test_values_and_ties(bits, signed, narrow, step, clip):
    made = quantizer(Quant(Uniform(bits, signed, narrow and signed), PerTensor(), Learned(AbsMax()), clip=clip), step)
    ties = torch.arange(-2.0 ** bits, 2.0 ** bits, 0.5) * step
    x = torch.cat([ties, torch.randn(200) * step * 2.0 ** (bits - 1), torch.tensor([0.0, -0.0, 1e30, -1e30])])
    assert torch.equal(through(made, x), made(x))


@pytest.mark.parametrize("bits, zero", [(8, 128), (8, 0), (8, 255), (4, 6), (3, 4)])
def test_a_zero_in_codes(bits, zero):
    """Even ones; an odd zero moves exact ties only, which fitting.py says."""
    torch.manual_seed(0)                                          # x / s + z loses bits, so a value next to a tie may become one
    made = quantizer(Quant(Uniform(bits, False), PerTensor(), Learned(MinMax())), 0.25, zero)
    x = torch.randn(500) * 20
    assert torch.equal(through(made, x), made(x))
    odd = quantizer(Quant(Uniform(8, False), PerTensor(), Learned(MinMax())), 0.25, 127)
    tie = torch.tensor([0.125])
    assert through(odd, tie) != odd(tie) and torch.equal(through(odd, x), odd(x))


def test_one_step_a_channel(tmp_path):
    made = Quantizer(Quant(Uniform(8), PerChannel(1), Learned(AbsMax()))).initialise(torch.randn(2, 3, 5) * torch.tensor([1.0, 2.0, 9.0])[:, None])
    x = torch.randn(2, 3, 5) * 4
    path = write(marked(signal(made, "m:input"), ["batch", 3, 5]), tmp_path / "m.onnx", "int8")
    assert torch.equal(run(path, x=x), made(x))


def test_eight_bits_take_no_clip(tmp_path):
    ops = []
    for bits in (8, 7):
        data = marked(signal(quantizer(Quant(Uniform(bits), PerTensor(), Learned(AbsMax())), 0.1), "m:input"), [None])
        ops.append([node.op_type for node in onnx.load(write(data, tmp_path / f"{bits}.onnx", "int8")).graph.node])
    assert ops == [["QuantizeLinear", "DequantizeLinear", "Identity"], ["Clip", "QuantizeLinear", "DequantizeLinear", "Identity"]]


def test_left_out_aloud(tmp_path):
    """A -weights target takes what the others refuse, computes without it, and says so."""
    data = marked(signal(Quantizer(Quant(Uniform(4), PerTensor(), AbsMax())), "m:input"), [None])
    path = write(data, tmp_path / "m.onnx", "int8-weights")
    x = torch.randn(9)
    assert torch.equal(run(path, x=x), x) and unused(path) == ([], ["m:input"])
    assert [node.op_type for node in data.graph.model.graph] == ["Quantize", "Identity"], "the checkpoint's own graph stays"
