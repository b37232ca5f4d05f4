"""A quantizer of activations as QuantizeLinear and DequantizeLinear, in the place of its mark in the graph.

    x -> [Clip] -> QuantizeLinear(ADDRESS.scale, ADDRESS.zero) -> DequantizeLinear(the same) -> y

The Clip stands where the grid ends before 8 bits do. Cutting x to [s (low - z), s (high - z)] and then rounding is rounding and then cutting, since
both only grow. `drop` takes a mark out without putting anything in its place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.grain import PerChannel
from ..checkpoint import DOMAIN, MARK, Signal
from .fitting import clip
from .weights import constant


def marks(graph: Any) -> list[Any]:
    """The nodes `qatlas::Quantize`."""
    return [node for node in graph if node.domain == DOMAIN and node.op_type == MARK]


def address(mark: Any) -> str:
    """Of the quantizer that stands here."""
    return str(mark.attributes["of"].as_string())


def drop(graph: Any, mark: Any) -> None:
    """x in the place of the mark."""
    _put(graph, mark, mark.inputs[0], [])


def lower(graph: Any, mark: Any, signal: Signal) -> None:
    """The quantizer in the place of the mark. One that is called twice has one step and one zero."""
    import onnx_ir as ir

    name, quant, x = address(mark), signal.quant, mark.inputs[0]
    assert signal.scale is not None, "why_not_signal has let it through"
    scale = signal.scale.detach().cpu().float()
    zero = torch.zeros_like(scale) if signal.zero is None else signal.zero.detach().cpu().float()
    axis = {"axis": quant.grain.axis} if isinstance(quant.grain, PerChannel) else {}
    shape = tuple(scale.shape) if axis else ()                    # one step for all is a scalar
    signed = bool(quant.grid.signed)  # type: ignore[attr-defined]
    given = [_once(graph, f"{name}.scale", scale.reshape(shape).numpy()),
             _once(graph, f"{name}.zero", zero.reshape(shape).numpy().astype(np.int8 if signed else np.uint8))]
    nodes = []
    if (ends := _ends(signal, scale, zero)) is not None:
        edges = [_once(graph, f"{name}.{end}", np.array(value, dtype=np.float32)) for end, value in zip(("low", "high"), ends, strict=True)]
        nodes.append(ir.node("Clip", [x, *edges]))
    nodes.append(ir.node("QuantizeLinear", [nodes[-1].outputs[0] if nodes else x, *given], axis))
    nodes.append(ir.node("DequantizeLinear", [nodes[-1].outputs[0], *given], axis))
    for node in nodes:
        node.outputs[0].shape = x.shape
        node.outputs[0].type = ir.TensorType(ir.DataType.INT8 if signed else ir.DataType.UINT8) if node.op_type == "QuantizeLinear" else x.type
    _put(graph, mark, nodes[-1].outputs[0], nodes)


def _ends(signal: Signal, scale: Tensor, zero: Tensor) -> tuple[float, float] | None:
    """Where x is cut, in values."""
    ends = clip(signal.quant)
    if ends is None:
        return None
    low, high = (float(scale * (end - zero)) for end in ends)
    most = signal.quant.clip
    return (low, high) if most is None else (max(low, -most), min(high, most))


def _once(graph: Any, name: str, value: Any) -> Any:
    import onnx_ir as ir

    return graph.initializers[name] if name in graph.initializers else constant(graph, name, ir.tensor(value))


def _put(graph: Any, mark: Any, value: Any, nodes: list[Any]) -> None:
    import onnx_ir as ir

    graph.insert_before(mark, nodes)
    ir.convenience.replace_all_uses_with(mark.outputs[0], value, replace_graph_outputs=True)
    graph.remove(mark, safe=True)
