"""What others read in the directory: compressed-tensors, which converts it, layer by layer, and transformers with gptqmodel (../loaded.py).

compressed-tensors unpacks codes and zeros by its own knowledge of AutoAWQ's order, and decompresses its own form in the type of the steps: handed
over in fp32 they give the exact weights.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...core.error import FormatError
from .. import loaded
from ..shards import tensors
from .directory import config, parts, whole
from .layout import BITS, Parts


def lacks() -> str | None:
    """The sentence for a missing reader, or None."""
    there = find_spec("compressed_tensors")
    return None if there else "the package compressed-tensors is not installed, which reads awq directories: pip install 'qatlas[compressed-tensors]'"


def read(path: str | Path) -> dict[str, Tensor]:
    """The weights of a directory under their Hugging Face names, fp32, through the converter and the decompression of compressed-tensors.

    Raises:
        FormatError: no such directory, a truncated or foreign one, or the package is missing.
    """
    if lacks():
        raise FormatError(str(lacks()))
    layers, found = parts(path)
    out: dict[str, Tensor] = {}
    mine: dict[str, dict[str, Tensor]] = {layer: {} for layer in layers}
    for name, tensor in tensors(found):
        layer, _, part = name.rpartition(".")
        if layer in mine and part in Parts._fields:
            mine[layer][part] = tensor
        else:
            out[name] = tensor.float() if tensor.is_floating_point() else tensor
    return out | {f"{layer}.weight": _decoded(whole(layer, have)) for layer, have in mine.items()}


def _decoded(layer: Parts) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationScheme

    size = layer.qweight.shape[0] // layer.scales.shape[0]
    named = {f"layer.{part}": value.float() if part == "scales" else value for part, value in layer._asdict().items()}
    turned = AutoAWQConverter(BITS, size, ignore=()).process(named)
    said = QuantizationScheme(targets=["Linear"], format="pack-quantized", weights={
        "num_bits": BITS, "type": "int", "symmetric": False, "strategy": "group", "group_size": size})
    made = {name.removeprefix("layer."): value for name, value in turned.items()}
    return BaseCompressor.get_value_from_registry("pack-quantized").decompress(made, said)["weight"].float()


def model(path: str | Path) -> nn.Module | str:
    """The model that transformers loads from the directory, computing in fp32, or a sentence on why it cannot.

    Raises:
        FormatError: a directory that transformers refuses.
    """
    if not find_spec("gptqmodel"):
        return "the package gptqmodel is not installed, through which transformers loads awq directories: pip install gptqmodel"
    from transformers.utils.quantization_config import AwqBackend, AwqConfig

    config(path)
    return loaded.load(path, AwqConfig(backend=AwqBackend.TORCH_AWQ), _decode)


def _decode(layer: Any) -> Tensor:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    found: Tensor = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), layer.bits, layer.group_size)
    return found
