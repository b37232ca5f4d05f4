"""Graphs made by hand, as model.graph would trace them, without its seconds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from qatlas.core.qtensor import QTensor
from qatlas.export.checkpoint import DOMAIN, MARK, Checkpoint, Graph, Signal


def value(name, shape, kind=ir.DataType.FLOAT, const=None):
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape), const_value=const)


def constant(name, array):
    return value(name, array.shape, ir.DataType.from_numpy(array.dtype), ir.tensor(array, name=name))


def finish(inputs, outputs, nodes, initializers, opset):
    made = ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports={"": opset}, name="by hand")
    return ir.Model(made, ir_version=10)


def product(shape, how="linear", opset=21):
    """x -> product with "w.weight" of a shape: linear (transposed, then MatMul), gemm, gather, conv, or both (a tied embedding and head)."""
    weight = constant("w.weight", np.zeros(shape, dtype=np.float32))
    out = value("y", [None] * (4 if how == "conv" else 3 if how in ("both", "gather") else 2))
    turned = value("turned", shape[::-1])
    turn = ir.node("Transpose", [weight], {"perm": [1, 0]}, outputs=[turned]) if how in ("linear", "both") else None
    if how in ("gather", "both"):
        x = value("x", ["batch", "tokens"], ir.DataType.INT64)
        rows = value("rows", ["batch", "tokens", shape[1]])
        nodes = [ir.node("Gather", [weight, x], outputs=[out if how == "gather" else rows])]
        nodes += [turn, ir.node("MatMul", [rows, turned], outputs=[out])] if how == "both" else []
        return finish([x], [out], nodes, [weight], opset)
    x = value("x", ["batch", shape[1], 5, 5] if how == "conv" else ["batch", shape[1]])
    nodes = [turn] if how == "linear" else []
    nodes.append({"linear": lambda: ir.node("MatMul", [x, turned], outputs=[out]), "conv": lambda: ir.node("Conv", [x, weight], outputs=[out]),
                  "gemm": lambda: ir.node("Gemm", [x, weight], {"transB": 1}, outputs=[out])}[how]())
    return finish([x], [out], nodes, [weight], opset)


def made(tensor: QTensor, how="linear", opset=21, **more) -> Checkpoint:
    return Checkpoint({}, {"w.weight": tensor, **more}, graph=Graph(product(tuple(tensor.shape), how, opset), {}))


def marked(signal: Signal, shape, opset=21) -> Checkpoint:
    """x of a shape -> one quantizer, "m:input" -> y."""
    x, y = value("x", shape), value("y", shape)
    nodes = [ir.node(MARK, [x], {"of": "m:input"}, domain=DOMAIN, outputs=[value("q", shape)])]
    nodes.append(ir.node("Identity", [nodes[0].outputs[0]], outputs=[y]))
    model = finish([x], [y], nodes, [], opset)
    model.graph.opset_imports[DOMAIN] = 1
    return Checkpoint({}, {}, graph=Graph(model, {"m:input": signal}))


def run(path, **feed):
    """The first output, by onnxruntime with optimizations off."""
    from qatlas.export.onnx.runtime import session

    return torch.from_numpy(session(str(path)).run(None, {name: x.numpy() for name, x in feed.items()})[0])
