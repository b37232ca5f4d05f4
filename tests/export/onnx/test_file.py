"""What is refused, and that nothing is left behind; files that are not ours."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("onnxruntime")

import onnx
from small_graph import made, marked

from qatlas.core.error import FormatError
from qatlas.core.floats import Float
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scheme import scheme
from qatlas.export.checkpoint import Checkpoint, Signal
from qatlas.export.onnx import answers, file, plan, read, unused, write


def tensor(grid=None):
    torch.manual_seed(0)
    return Quant(grid or Uniform(4)).quantize(torch.randn(6, 24))


@pytest.fixture
def path(tmp_path):
    return write(made(tensor(), **{"spare": torch.ones(3)}), tmp_path / "m.onnx", "int4")


def test_what_the_computation_does_not_use_is_named(path):
    assert unused(path) == (["spare"], []) and set(read(path)) == {"w.weight"}


def test_a_file_in_the_way_stays(path):
    before = path.read_bytes()
    with pytest.raises(FormatError, match="exists"):
        write(made(tensor()), path, "int4")
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("data, target, words", [
    (lambda: Checkpoint({}, {"w.weight": tensor()}), "int4", r"has none; set checkpoint.graph = .*opset=21"),
    (lambda: made(tensor()), "int2", "speaks opset 21, onnx:int2 is written in opset 25"),
    (lambda: made(tensor()), "int3", "nearest: onnx:int"),
    (lambda: made(tensor(Float(4, 3))), "int4", r"cannot hold w.weight: .*\n.*nearest scheme: w4-g32"),
    (lambda: made(tensor(), bad=torch.tensor([float("nan")])), "int4", "cannot hold bad: it holds NaN"),
    (lambda: marked(Signal(scheme("w4a8").input), [None]), "int4", r"m:input: AbsMax gives each token.*\n.*-static .*onnx:int4-weights")])
def test_refused_by_name_and_nothing_left(data, target, words, tmp_path):
    with pytest.raises(FormatError, match=words):
        write(data(), tmp_path / "m.onnx", target)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_onnx_refuses(tmp_path):
    data = made(tensor())
    next(node for node in data.graph.model.graph if node.op_type == "MatMul").op_type = "MatMulls"
    with pytest.raises(FormatError, match="onnx refuses"):
        write(data, tmp_path / "m.onnx", "int4")
    assert not list(tmp_path.iterdir())


def test_too_large_for_one_file(monkeypatch, tmp_path):
    monkeypatch.setattr(file, "LIMIT", 100)
    with pytest.raises(FormatError, match="one ONNX file takes 100"):
        write(made(tensor()), tmp_path / "m.onnx", "int4")


def test_the_plan_names_types_and_finds_a_missing_extra_before_training(monkeypatch):
    data = Checkpoint({}, {"a": tensor(), "b": tensor(Uniform(8)), "c": torch.ones(2)})
    assert plan(data, "int4") == {"a": "INT4", "b": "INT8", "c": "FLOAT"}
    there = file.importlib.util.find_spec
    monkeypatch.setattr(file.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else there(name))
    with pytest.raises(FormatError, match=r"needs onnxscript.*qatlas\[onnx\]"):
        plan(data, "int4")


@pytest.mark.parametrize("spoil, words", [(lambda raw: raw[: len(raw) // 2], "no whole ONNX file"), (lambda raw: b"", "no whole ONNX file"),
                                          (lambda raw: b"not a protobuf", "no whole ONNX file")])
def test_a_damaged_file(path, spoil, words):
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(FormatError, match=words):
        read(path)


def test_a_foreign_file_and_none(path, tmp_path):
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    with pytest.raises(FormatError, match="not written by qatlas"):
        read(tmp_path / "foreign.onnx")
    with pytest.raises(FormatError, match="there is no ONNX file"):
        read(tmp_path / "gone.onnx")


def test_damaged_metadata(path):
    proto = onnx.load(path)
    next(entry for entry in proto.metadata_props if entry.key == "qatlas.unused").value = "["
    path.unlink()
    onnx.save(proto, path)
    with pytest.raises(FormatError, match="metadata"):
        unused(path)


def test_onnxruntime_says_no_in_words(path, tmp_path):
    with pytest.raises(FormatError, match="onnxruntime cannot run"):
        answers(path, [torch.ones(1, 7)])
    with pytest.raises(FormatError, match="there is no ONNX file"):
        answers(tmp_path / "gone.onnx", [torch.ones(1, 24)])
