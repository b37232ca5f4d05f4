"""A QTensor as integers and a DequantizeLinear, whose output takes the place of the weight in the graph.

    NAME.codes -> DequantizeLinear(NAME.scale, NAME.zero) -> NAME

The codes are the trained ones: the values of the grid times a power of two, as integers, packed with the first element in the low bits over the whole
tensor. Where the graph transposes a matrix before every product (torch's linear does), the codes lie transposed and the node gives `NAME.T`: engines
look for DequantizeLinear right in front of MatMul. Where groups run over a convolution's flattened inputs, codes are a matrix and a Reshape follows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.error import FormatError
from ...core.grain import Block, Group, PerChannel, PerTensor
from ...core.qtensor import QTensor, pack_bits
from .fitting import Kind, kind


def place(graph: Any, name: str, tensor: QTensor, target: str) -> None:
    """Put the codes in the place of the initializer `name`."""
    import onnx_ir as ir

    old = graph.initializers[name]
    if tuple(old.shape.numpy()) != tuple(tensor.shape):
        raise FormatError(f"{name} has shape {tuple(tensor.shape)} in the checkpoint, {tuple(old.shape.numpy())} in the graph: two models")
    del graph.initializers[name]
    turns = [user for user, _ in old.uses()]
    turned = bool(turns) and all(user.op_type == "Transpose" and list(user.attributes["perm"].as_ints()) == [1, 0] for user in turns)
    nodes = dequantize(graph, f"{name}.T" if turned else name, name, tensor, target, turned)
    new = nodes[-1].outputs[0]
    graph.insert_before(graph[0], nodes)
    for user in turns if turned else ():
        ir.convenience.replace_all_uses_with(user.outputs[0], new, replace_graph_outputs=True)
        graph.remove(user, safe=True)
    ir.convenience.replace_all_uses_with(old, new)


def dequantize(graph: Any, out: str, name: str, tensor: QTensor, target: str, turned: bool) -> list[Any]:
    """The nodes, their initializers registered."""
    import onnx_ir as ir

    zeros = torch.empty(0) if tensor.zero is None else tensor.zero
    found = kind(tensor.grid, target, zeros)
    assert found is not None, "why_not has let it through"
    shape = tuple(tensor.shape)
    codes, scale, zero, how = laid(tensor, found.times)
    if turned:
        codes, scale, zero = codes.T, scale.T if scale.dim() > 1 else scale, zero if zero is None or zero.dim() < 2 else zero.T
        how = {key: 1 - value if key == "axis" else value for key, value in how.items()}
    given = [constant(graph, f"{name}.codes", integers(codes, found)), constant(graph, f"{name}.scale", ir.tensor(scale.contiguous().numpy()))]
    if zero is not None:
        given.append(constant(graph, f"{name}.zero", integers(zero, found)))
    reshaped = not turned and tuple(codes.shape) != shape
    node = ir.node("DequantizeLinear", given, how, name=f"{name}.dequantize",
                   outputs=[_value(f"{name}.matrix" if reshaped else out, tuple(codes.shape))])
    if not reshaped:
        return [node]
    to = constant(graph, f"{name}.shape", ir.tensor(np.array(shape, dtype=np.int64)))
    return [node, ir.node("Reshape", [node.outputs[0], to], name=f"{name}.reshape", outputs=[_value(out, shape)])]


def laid(tensor: QTensor, times: int) -> tuple[Tensor, Tensor, Tensor | None, dict[str, int]]:
    """Integers, steps, zeros and the attributes of DequantizeLinear: axis, block_size."""
    codes = (tensor.values() * times).to(torch.int16).cpu()
    steps = (tensor.steps / times).cpu()
    zero = None if tensor.zero is None else (tensor.zero * times).to(torch.int16).cpu().expand(steps.shape)
    grain, parts = tensor.grain, (steps, zero)
    if isinstance(grain, PerTensor):
        steps, zero = (None if t is None else t.reshape(()) for t in parts)  # type: ignore[assignment]
        return codes, steps, zero, {}
    if isinstance(grain, PerChannel):
        return codes, steps, zero, {"axis": grain.axis % codes.dim()}
    if isinstance(grain, Group):
        return codes.reshape(steps.shape[0], -1), steps, zero, {"axis": 1, "block_size": grain.size}
    if isinstance(grain, Block):
        steps, zero = (None if t is None else t.repeat_interleave(grain.rows, 0) for t in parts)  # type: ignore[assignment]
        return codes.reshape(codes.shape[0], -1), steps, zero, {"axis": 1, "block_size": grain.cols}
    raise FormatError(f"{grain} has no place in DequantizeLinear; take one step for the tensor, a channel, a group or a tile")


def integers(values: Tensor, found: Kind) -> Any:
    """An ONNX tensor of integers: bytes, or packed over the whole tensor with the first element in the low bits."""
    import onnx_ir as ir

    if found.bits == 8:
        return ir.tensor(values.contiguous().numpy().astype(np.int8 if found.signed else np.uint8))
    codes = (values.contiguous().flatten() & (2**found.bits - 1)).to(torch.uint8)
    return ir.PackedTensor(pack_bits(codes, found.bits).numpy(), ir.DataType[found.name], shape=tuple(values.shape))


def constant(graph: Any, name: str, tensor: Any) -> Any:
    """An initializer."""
    import onnx_ir as ir

    tensor.name = name
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _value(name: str, shape: tuple[int, ...]) -> Any:
    import onnx_ir as ir

    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
