"""From a traced computation to an ExecuTorch program. The trained codes go into the place of the weights, q/dq nodes into that of the marks; then
XNNPACK's partitioner takes both with the product between them.

    w         -> dequantize_per_channel[_group](codes, steps)       a constant of XNNPACK: qcint8, qcint4, qbint4
    mark(x)   -> choose_qparams, quantize, dequantize               the engine's own, at run time: qdint8; of a token, or of an image before a conv2d

What it would not take stays behind as an operator that the runtime does not have; such a program is refused here.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core.error import FormatError
from ...core.qtensor import QTensor
from ..checkpoint import MARK, Checkpoint, Traced
from ..integers import spread
from .fitting import bits, neighbours, times
from .process import ABOUT, digest

PRODUCTS = ("aten.linear.default", "aten.conv2d.default")
SAID = "aten._assert_tensor_metadata"
PASSED = ("aten.to", "aten.alias")                                # between a weight and its product: the identity


def program(checkpoint: Checkpoint, target: str) -> bytes:
    """The bytes of the file.

    Raises:
        FormatError: a weight that is no linear layer's, or what ExecuTorch refuses.
    """
    module, said = quantized(checkpoint, target)
    assert checkpoint.graph is not None
    traced: Traced = checkpoint.graph.model
    about = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
    with silent():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        try:
            again = torch.export.export(module, traced.given, dynamic_shapes=_opened(traced))
            edge = to_edge_transform_and_lower(again, partitioner=[XnnpackPartitioner()], constant_methods={ABOUT: about},
                                               compile_config=EdgeCompileConfig(_check_ir_validity=False))
            left = _left(edge.exported_program().graph)
            if left:
                raise FormatError(f"XNNPACK does not take all quantized products: {', '.join(left)} stayed behind, which its runtime lacks. A "
                                  "layer's quantized input must go into that layer's product alone")
            return bytes(edge.to_executorch().buffer)
        except FormatError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            raise FormatError(f"ExecuTorch cannot compile this computation: {type(error).__name__}: {lines[0][:300]}") from error


def quantized(checkpoint: Checkpoint, target: str) -> tuple[Any, dict[str, Any]]:
    """The module with codes and q/dq nodes, and what the program says of itself; the checkpoint's own stays as it is."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401  (registers the operators)

    assert checkpoint.graph is not None
    traced: Traced = checkpoint.graph.model
    module = copy.deepcopy(traced.module)
    graph, known = module.graph, traced.names
    used: dict[str, dict[str, Any]] = {}
    for node in [node for node in graph.nodes if str(node.target).startswith(SAID)]:
        graph.erase_node(node)                                    # what is said of a tensor's type keeps alive that somebody read it (ViT)
    graph.eliminate_dead_code()
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        name = known.get(node.target, node.target)
        tensor = checkpoint.tensors.get(name)
        if isinstance(tensor, QTensor):
            used[name] = _weight(module, node, name, tensor, target)
        elif tensor is not None and node.users:
            used[name] = _plain(tensor)
    for node in [node for node in graph.nodes if marked(node)]:
        _input(module, node, any("conv2d" in str(user.target) for user in node.users))
    graph.eliminate_dead_code()
    module.recompile()
    said = {"target": f"executorch:{target}", "unused": [name for name in checkpoint.tensors if name not in used], "left_out": [], "tensors": used}
    return module, said


def marked(node: Any) -> bool:
    """Whether a quantizer stands here."""
    return node.op == "call_function" and "onnx_symbolic" in str(node.target) and node.args[1] == MARK


def laid(tensor: QTensor, target: str) -> tuple[Tensor, Tensor, int, int]:
    """Codes int8 (out, ...), steps fp32 (out,) or (out, groups), bits, and the size of a group, 0 for one step a channel."""
    shape = tuple(tensor.shape)
    many, size, wide = times(tensor), neighbours(tensor.grain, shape), bits(tensor, target, len(shape))
    assert size is not None and wide is not None, "why_not has let it through"
    codes = (tensor.values() * many).to(torch.int8).cpu()
    steps = spread(tensor.grain, (tensor.steps.detach().float() / many).cpu(), shape).flatten(1)[:, ::size].contiguous()
    return (codes, steps, wide, size) if size < codes[0].numel() else (codes, steps.flatten().clone(), wide, 0)


def stored(codes: Tensor, steps: Tensor, wide: int, size: int) -> dict[str, Any]:
    """How XNNPACK holds it: what process.constants finds in the program."""
    raw = codes.permute(0, 2, 3, 1).contiguous() if codes.dim() == 4 else codes
    shape = list(raw.shape)
    if wide == 4:
        up = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).to(torch.uint8) + 8
        raw = up[:, 1::2] << 4 | up[:, ::2]
    kind = "qbint4" if size else f"qcint{wide}"
    return {"type": kind, "shape": shape, "codes": _digest(raw), "axis": 0, "scale": _digest(steps.bfloat16() if size else steps), "group": size}


def _weight(module: Any, node: Any, name: str, tensor: QTensor, target: str) -> dict[str, Any]:
    """A dequantizer in the place of a weight."""
    ops: Any = torch.ops.quantized_decomposed
    codes, steps, wide, size = laid(tensor, target)
    at = name.replace(".", "_")
    zeros = torch.zeros_like(steps, dtype=torch.int8 if size else torch.int64)
    for part, value in (("codes", codes), ("steps", steps), ("zeros", zeros)):
        module.register_buffer(f"{at}_{part}", value)
    low, high = -(2 ** (wide - 1)), 2 ** (wide - 1) - 1
    last = _identity(node)
    for user in last.users:
        if not str(user.target).startswith(PRODUCTS) or user.args[1] is not last:
            raise FormatError(f"{name} goes into {user.target}, and XNNPACK quantizes the weights of linear products and of 2-d convolutions alone; "
                              "keep it in full precision")
        if len(user.args) > 6 and user.args[6] != 1:
            raise FormatError(f"{name} belongs to a convolution of {user.args[6]} groups, and XNNPACK quantizes inputs of one group as they come; "
                              "keep it in full precision")
    with module.graph.inserting_before(last):
        given = [module.graph.get_attr(f"{at}_{part}") for part in ("codes", "steps", "zeros")]
        new = (module.graph.call_function(ops.dequantize_per_channel_group.default, (*given, low, high, torch.int8, size, torch.float32)) if size else
               module.graph.call_function(ops.dequantize_per_channel.default, (*given, 0, low, high, torch.int8)))
    last.replace_all_uses_with(new)
    return stored(codes, steps, wide, size)


def _identity(node: Any) -> Any:
    """The last of the nodes that pass a tensor on as it is."""
    onward = [user for user in node.users if str(user.target).startswith(PASSED)]
    return _identity(onward[0]) if len(onward) == len(node.users) == 1 else node


def _input(module: Any, node: Any, whole: bool) -> None:
    """The engine's own quantizer in the place of a mark, one for each layer, since the partitioner takes one with each product: a token's, or of the
    whole image in front of a convolution."""
    ops: Any = torch.ops.quantized_decomposed
    x, make, ends = node.args[0][0], module.graph.call_function, (-128, 127)
    with module.graph.inserting_before(node):
        pair = (make(ops.choose_qparams.tensor, (x, *ends, torch.finfo(torch.float32).eps, torch.int8)) if whole else
                make(ops.choose_qparams_per_token_asymmetric.default, (x, torch.int8)))
        place = tuple(make(operator.getitem, (pair, i)) for i in (0, 1))
        if whole:
            codes = make(ops.quantize_per_tensor.tensor, (x, *place, *ends, torch.int8))
            y = make(ops.dequantize_per_tensor.tensor, (codes, *place, *ends, torch.int8))
        else:
            codes = make(ops.quantize_per_token.default, (x, *place, *ends, torch.int8))
            y = make(ops.dequantize_per_token.default, (codes, *place, *ends, torch.int8, torch.float32))
    node.replace_all_uses_with(y)
    module.graph.erase_node(node)


def _plain(tensor: Tensor) -> dict[str, Any]:
    x = tensor.detach().cpu().contiguous()
    x = x.float() if x.is_floating_point() else x
    return {"plain": _digest(x), "shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}


def _digest(x: Tensor) -> str:
    return digest(x.contiguous().view(torch.uint8).numpy().tobytes() if x.dim() else x.reshape(1).view(torch.uint8).numpy().tobytes())


def _opened(traced: Traced) -> Any:
    return traced.open["given"] if isinstance(traced.open, dict) and "given" in traced.open else traced.open


def _left(graph: Any) -> list[str]:
    """Quantizers that no delegate took."""
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return sorted({name.split(".")[-2] for name in names if "quantized_decomposed" in name})


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what the compilers print and log, which speaks of their own work."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
