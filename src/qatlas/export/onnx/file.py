"""Writing and reading an ONNX file. The graph comes with the checkpoint; the trained codes go into the place of its weights, and
QuantizeLinear/DequantizeLinear into the place of its marks. Nothing is rounded, and nothing is quantized again.

Everything that the target cannot hold is refused before the file is begun, all of it by name. The file is checked by onnx and appears under its name
only when it is whole; one that exists is not overwritten. What a file cannot say by itself stands in its metadata:

    qatlas.target          the target
    qatlas.unused          tensors of the checkpoint that the computation does not use, and that are therefore not in the file
    qatlas.left_out        quantizers of activations that a -weights target left out
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.error import FormatError, foreign
from ...core.qtensor import QTensor
from ..checkpoint import DOMAIN, Checkpoint, appearing, vacant
from . import nbits, runtime, weights
from .fitting import NBITS, ONLY, OPSETS, SCHEMES, ints, kind, known, why_not, why_not_signal
from .signals import address, drop, lower, marks

LIMIT = 2**31 - 1                                                 # bytes of a protobuf message
OURS = {"DequantizeLinear": ".dequantize", "Reshape": ".reshape"}   # what weights.py writes; a file may hold any other node under these names
SHOWN = 4                                                         # names of one kind that an error lists


def write(checkpoint: Checkpoint, path: str | Path, target: str) -> Path:
    """The checkpoint as an ONNX file: the whole computation, quantized weights as integers.

    Args:
        path: the file to make; must not exist.
        target: one of TARGETS.

    Raises:
        FormatError: a checkpoint without a graph, what the target cannot hold, a file that is in the way. Then nothing is left behind.
    """
    path = Path(path)
    known(target)
    _needs()
    vacant(path)
    check(checkpoint, target)
    import onnx
    import onnx_ir as ir

    proto = ir.to_proto(rewritten(checkpoint, target))
    if (size := proto.ByteSize()) > LIMIT:
        raise FormatError(f"the file would take {size} bytes, and one ONNX file takes {LIMIT}; keep fewer tensors in full precision")
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise FormatError(f"onnx refuses what we made of this graph: {str(error).strip().splitlines()[0]}") from None
    with appearing(path) as aside:
        aside.write_bytes(proto.SerializeToString())
    return path


def plan(checkpoint: Checkpoint, target: str) -> dict[str, str]:
    """The type of each tensor in the file: an integer type of ONNX, or FLOAT. Asked before training, when there is no graph yet.

    Raises:
        FormatError: a tensor that the target cannot hold, or a missing extra, which would otherwise be found when all is trained.
    """
    known(target)
    _needs("onnxscript", "onnxruntime")
    _refuse({name: why_not(t, target) for name, t in checkpoint.tensors.items() if not isinstance(t, Tensor)}, target, _scheme(target))
    return {name: "FLOAT" if isinstance(t, Tensor) else
            kind(t.grid, target, torch.empty(0) if t.zero is None else t.zero, len(t.shape) == 2).name  # type: ignore[union-attr]
            for name, t in checkpoint.tensors.items()}


def check(checkpoint: Checkpoint, target: str) -> None:
    """Raises FormatError, naming all that the target cannot hold."""
    if checkpoint.graph is None:
        raise FormatError("an ONNX file holds the whole computation, and this checkpoint has none; set checkpoint.graph = "
                          f"qatlas.model.graph.graph(model, opset={OPSETS[target]})")
    opset = checkpoint.graph.model.opset_imports.get("")
    if opset != OPSETS[target]:
        raise FormatError(f"the graph speaks opset {opset}, onnx:{target} is written in opset {OPSETS[target]}; trace it with that")
    broken: dict[str, str | None] = {name: "it holds NaN or infinity" for name, t in checkpoint.tensors.items()
                                     if isinstance(t, Tensor) and t.is_floating_point() and not torch.isfinite(t).all()}
    refused = {name: why_not(t, target, tuple(t.dequantize().shape)) for name, t in checkpoint.tensors.items() if not isinstance(t, Tensor)}
    _refuse(broken | refused, target, _scheme(target))
    static = f"{_scheme(target)}: activations with -static (in papers: static=True); or onnx:{target}{ONLY}, which leaves them in full precision"
    _refuse({name: why_not_signal(signal, target) for name, signal in checkpoint.graph.signals.items()}, target, static)


def _scheme(target: str) -> str:
    return f"nearest scheme: {SCHEMES[ints(target)]}"


def _refuse(faults: dict[str, str | None], target: str, instead: str) -> None:
    found = {name: reason for name, reason in faults.items() if reason}
    if found:
        first, *more = found
        also = f"\n  refused as well: {len(more)} more ({', '.join(more[:SHOWN])}{', ...' if more[SHOWN:] else ''})" if more else ""
        raise FormatError(f"onnx:{target} cannot hold {first}: {found[first]}.\n  {instead}{also}")


def rewritten(checkpoint: Checkpoint, target: str) -> Any:
    """The graph with codes in the place of weights and QDQ in the place of marks; the checkpoint's own stays as it is."""
    assert checkpoint.graph is not None
    model = checkpoint.graph.model.clone()
    graph, signals = model.graph, checkpoint.graph.signals
    unused = [name for name in checkpoint.tensors if name not in graph.initializers]
    left = sorted({address(mark) for mark in marks(graph)}) if target.endswith(ONLY) else []
    for mark in marks(graph):
        drop(graph, mark) if left else lower(graph, mark, signals[address(mark)])
    for name, tensor in checkpoint.tensors.items():
        if isinstance(tensor, QTensor) and name not in unused:
            (nbits if NBITS in target and nbits.products(graph, name) else weights).place(graph, name, tensor, target)
    model.opset_imports.pop(DOMAIN, None)
    graph.opset_imports.pop(DOMAIN, None)
    for initializer in [value for value in graph.initializers.values() if not value.uses() and not value.is_graph_output()]:
        del graph.initializers[initializer.name]
    model.ir_version = 13 if OPSETS[target] > 21 else 10
    model.producer_name, graph.name = "qatlas", checkpoint.name
    model.metadata_props.update({"qatlas.target": f"onnx:{target}", "qatlas.unused": json.dumps(unused), "qatlas.left_out": json.dumps(left)})
    return model


def read(path: str | Path, engine: Any = runtime) -> dict[str, Tensor]:
    """The tensors of a file of ours under their names, fp32 where they are quantized: as an engine's own DequantizeLinear or MatMulNBits has them.

    engine: one of ENGINES.

    Raises:
        FormatError: no file, a truncated or foreign one, or one that the engine does not take.
    """
    proto = _open(path)
    with foreign(f"{path} is no whole ONNX file; write it anew"):
        return _read(proto, engine)


def _read(proto: Any, engine: Any) -> dict[str, Tensor]:
    import onnx
    from onnx import helper

    plain = {t.name: t for t in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if node.op_type in OURS and node.name.endswith(OURS[node.op_type])]
    nodes = [node for node in nodes if all(name in plain for name in node.input[1:])]
    nodes = [node for node in nodes if node.input[0] in plain or any(node.input[0] in other.output for other in nodes)]
    products = {node.input[1]: node for node in proto.graph.node if node.op_type == nbits.OP}
    inner = {name for node in nodes for name in node.input} | {name for node in products.values() for name in node.input[1:]}
    outs = [name for node in nodes for name in node.output if name not in inner]
    floats = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outs]
    used = [plain[name] for node in nodes for name in node.input if name in plain]
    small = helper.make_graph(nodes, "weights", [], floats, list({t.name: t for t in used}.values()))
    opsets = [entry for entry in proto.opset_import if entry.domain == ""]
    ask = engine.start(helper.make_model(small, opset_imports=opsets, ir_version=proto.ir_version).SerializeToString()) if outs else None
    values = zip(outs, map(torch.from_numpy, ask({})), strict=True) if ask else ()
    out = {name.removesuffix(".T"): value.T.contiguous() if name.endswith(".T") else value for name, value in values}
    out |= {name.removesuffix(".codes"): nbits.weight(node, plain, engine.start) for name, node in products.items()}
    return out | {name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for name, t in plain.items() if name not in inner}


def types(path: str | Path) -> dict[str, int]:
    """How many quantized weights of which type."""
    proto = _open(path)
    import onnx

    kinds = {t.name: t.data_type for t in proto.graph.initializer}
    found = {node.input[1]: f"{nbits.OP} of {next(a.i for a in node.attribute if a.name == 'bits')} bits"
             for node in proto.graph.node if node.op_type == nbits.OP}
    found |= {node.input[0]: onnx.TensorProto.DataType.Name(kinds[node.input[0]]) for node in proto.graph.node if node.name.endswith(".dequantize")}
    return dict(sorted(Counter(found.values()).items()))


def unused(path: str | Path) -> tuple[list[str], list[str]]:
    """What a file of ours does not hold: names of tensors that the computation does not use, addresses of quantizers that were left out."""
    found = {entry.key: entry.value for entry in _open(path).metadata_props}
    try:
        return json.loads(found["qatlas.unused"]), json.loads(found["qatlas.left_out"])
    except (KeyError, ValueError) as error:
        raise FormatError(f"the metadata of {path} cannot be read ({error}); it was edited or is damaged, write it anew") from None


def _open(path: str | Path) -> Any:
    _needs()
    import onnx

    if not Path(path).is_file():
        raise FormatError(f"there is no ONNX file {path}")
    with foreign(f"{path} is no whole ONNX file; it is truncated or of another kind, write it anew"):
        proto = onnx.load_model_from_string(Path(path).read_bytes())
        onnx.checker.check_model(proto)
    names = (name for node in proto.graph.node for name in (node.name, node.op_type, *node.input, *node.output))
    if any(isinstance(name, bytes) for name in (*names, *(t.name for t in proto.graph.initializer))):      # protobuf's way to say: no text
        raise FormatError(f"{path} has names that are no text; it is damaged, write it anew")
    if not any(entry.key == "qatlas.target" for entry in proto.metadata_props):
        raise FormatError(f"{path} was not written by qatlas: its metadata has no qatlas.target, and its tensors other names")
    return proto


def _needs(*more: str) -> None:
    for name in ("onnx", "onnx_ir", *more):
        if importlib.util.find_spec(name) is None:
            raise FormatError(f"the ONNX format needs {name}, which is not installed: pip install 'qatlas[onnx]'")
