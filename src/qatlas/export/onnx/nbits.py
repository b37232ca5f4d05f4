"""A matrix as com.microsoft MatMulNBits: a product that reads its weight packed. What onnxruntime-genai and its kin take for language models.

    x, NAME.codes, NAME.scale, [NAME.zero] -> MatMulNBits -> y = x W^T,      W[n, k] = scale[n, k / block] (code[n, k] - zero[n, k / block])

    codes   uint8 (N, K / block, block bits / 8), 2, 4 or 8 bits, LSB first; a row that the block does not divide is filled up with zeros
    scale   fp32 (N, K / block)
    zero    uint8, packed over the row; left out where it is 2^(bits - 1)

A block is 16, 32, ... or 256 inputs. A coarser step, of a larger group, a channel or the tensor, is repeated for each of its blocks; one of another
axis, or of a group that 16 does not divide, has no place and is refused.

`accuracy_level` says how low the engine may go with the other factor: 0 leaves it to the engine, 1 is fp32, 2 fp16, 3 bf16, 4 int8. We write 1. At 4
onnxruntime rounds x to 8 bits in blocks (an error of 0.2 to 2 where 1 has 1e-5, in products of 256 terms).

The node is a product, not a weight. So a weight that is looked up too (a tied embedding), or that a convolution uses, stays a DequantizeLinear of one
copy of the codes. Back it comes as the product with the identity: sums of zeros and one weight, which is the weight, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.error import FormatError
from ...core.grain import Block, Grain, Group, PerTensor
from ...core.qtensor import QTensor, pack_bits
from .fitting import LEVEL, kind, width
from .weights import constant

DOMAIN, OP = "com.microsoft", "MatMulNBits"
ROWS = 512                                                        # of the identity, at a time


def products(graph: Any, name: str) -> list[tuple[Any, Any]]:
    """(the product, the node that transposes the weight for it or None), for each user of the initializer; nothing where one is no such product."""
    found = []
    for user, _ in graph.initializers[name].uses():
        if user.op_type == "Transpose" and list(user.attributes["perm"].as_ints()) == [1, 0]:
            for product, place in user.outputs[0].uses():
                if product.op_type != "MatMul" or place != 1:
                    return []
                found.append((product, user))
        elif user.op_type == "Gemm" and user.inputs[1] is graph.initializers[name] and _plain(user):
            found.append((user, None))
        else:
            return []
    return found


def _plain(gemm: Any) -> bool:
    """x W^T + b and nothing else."""
    given = {key: value.value for key, value in gemm.attributes.items()}
    return given.get("transB", 0) == 1 and not given.get("transA", 0) and given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0


def place(graph: Any, name: str, tensor: QTensor, target: str) -> None:
    """MatMulNBits in the place of each product with the initializer `name`."""
    import onnx_ir as ir

    found, old = products(graph, name), graph.initializers[name]
    if tuple(old.shape.numpy()) != tuple(tensor.shape):
        raise FormatError(f"{name} has shape {tuple(tensor.shape)} in the checkpoint, {tuple(old.shape.numpy())} in the graph: two models")
    codes, scale, zero, facts = laid(tensor, target)
    given = [constant(graph, f"{name}.codes", ir.tensor(codes.numpy())), constant(graph, f"{name}.scale", ir.tensor(scale.numpy()))]
    if zero is not None:
        given.append(constant(graph, f"{name}.zero", ir.tensor(zero.numpy())))
    for at, (product, _) in enumerate(found):
        node = ir.node(OP, [product.inputs[0], *given], facts, domain=DOMAIN, name=f"{name}.product{at or ''}")
        nodes = [node]
        if product.op_type == "Gemm" and len(product.inputs) > 2 and product.inputs[2] is not None:
            nodes.append(ir.node("Add", [node.outputs[0], product.inputs[2]]))
        for made in nodes:
            made.outputs[0].shape, made.outputs[0].type = product.outputs[0].shape, product.outputs[0].type
        graph.insert_before(product, nodes)
        ir.convenience.replace_all_uses_with(product.outputs[0], nodes[-1].outputs[0], replace_graph_outputs=True)
        graph.remove(product, safe=True)
    for turn in {id(turn): turn for _, turn in found if turn is not None}.values():
        graph.remove(turn, safe=True)
    del graph.initializers[name]
    graph.opset_imports[DOMAIN] = 1


def laid(tensor: QTensor, target: str) -> tuple[Tensor, Tensor, Tensor | None, dict[str, int]]:
    """Codes, steps, zeros and attributes, in the layout of the head."""
    zeros = torch.empty(0) if tensor.zero is None else tensor.zero
    found = kind(tensor.grid, target, zeros, product=True)
    assert found is not None, "why_not has let it through"
    n, k = tensor.shape
    block = width(tensor.grain, k)
    assert block is not None, "why_not has let it through"
    blocks, middle = -(-k // block), 2 ** (found.bits - 1)
    up = middle if found.signed else 0                            # from signed integers to unsigned codes
    scale = spread(tensor.steps.cpu() / found.times, tensor.grain, n, blocks, block)
    zero = torch.zeros_like(scale) if tensor.zero is None else spread((tensor.zero * found.times).cpu().expand(tensor.steps.shape), tensor.grain,
                                                                      n, blocks, block)
    points = (zero + up).to(torch.uint8)                          # (n, blocks)
    codes = (tensor.values() * found.times + up).to(torch.uint8).cpu()
    rest = points[:, -1:].expand(n, blocks * block - k)           # stands for 0, and meets no input
    codes = torch.cat([codes, rest], 1).reshape(n, blocks, block)
    facts = {"K": k, "N": n, "bits": found.bits, "block_size": block, "accuracy_level": LEVEL}
    return (pack_bits(codes, found.bits), scale.contiguous(), None if bool((points == middle).all()) else pack_bits(points, found.bits), facts)


def spread(steps: Tensor, grain: Grain, n: int, blocks: int, block: int) -> Tensor:
    """One step for each block: (n, blocks)."""
    if isinstance(grain, PerTensor):
        return steps.reshape(1, 1).expand(n, blocks)
    if isinstance(grain, Group):
        return steps.repeat_interleave(grain.size // block, 1)
    if isinstance(grain, Block):
        return steps.repeat_interleave(grain.rows, 0).repeat_interleave(grain.cols // block, 1)
    return steps.reshape(n, 1).expand(n, blocks)


def weight(node: Any, constants: dict[str, Any], start: Any) -> Tensor:
    """(N, K): what an engine multiplies with, for a node of a file of ours. start: model -> what runs it.

    Raises:
        FormatError: numbers that do not belong to the codes, seen before memory is asked for.
    """
    import onnx
    from onnx import helper

    facts = {given.name: given.i for given in node.attribute}
    k, n, bits, block = (facts.get(name, 0) for name in ("K", "N", "bits", "block_size"))
    have = list(constants[node.input[1]].dims) if len(node.input) > 1 and node.input[1] in constants else []
    if min(k, n, bits, block) < 1 or have != [n, -(-k // block), block * bits // 8]:
        raise FormatError(f"{node.name} says K={k}, N={n}, bits={bits}, block_size={block}, and its codes have the shape {have}; the file is damaged "
                          "or was edited, write it anew")
    product = helper.make_node(OP, ["x", *node.input[1:]], ["y"], domain=DOMAIN, **facts)
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", size]) for name, size in (("x", k), ("y", n)))
    graph = helper.make_graph([product], "weight", [x], [y], [constants[name] for name in node.input[1:]])
    ask = start(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)],
                                  ir_version=10).SerializeToString())
    out = torch.empty(n, k)
    for at in range(0, k, ROWS):
        some = np.eye(min(ROWS, k - at), k, at, dtype=np.float32)
        out[:, at : at + ROWS] = torch.from_numpy(ask({"x": some})[0]).T
    return out
