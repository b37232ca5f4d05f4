"""What transformers reads in the directory, layer by layer and as a model. And what we read ourselves, trusting nothing.

transformers compiles its small steps (torch.compile), which needs a compiler on the machine and minutes on a first call. Here they run as they are
written: the same operations, uncompiled. It unpacks the weights in every forward, so this is for proofs, not for speed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.error import FormatError
from ...core.qtensor import QTensor
from .. import folder
from .fitting import NAME, TARGETS
from .layout import load


def holds(path: str | Path) -> bool:
    """Whether a directory is of this format, by its config.json alone."""
    return (folder.said(path) or {}).get("quant_method") == NAME


def types(path: str | Path) -> dict[str, int]:
    """How many tensors of which type: ternary, full."""
    return dict(Counter("ternary" if isinstance(tensor, QTensor) else "full" for tensor in qtensors(path).values()))


def qtensors(path: str | Path) -> dict[str, QTensor | Tensor]:
    """Hugging Face name -> QTensor, whose `dequantize()` is t / weight_scale (bitlinear) or t weight_scale (autobitlinear) in fp32, bit for bit; or
    the plain tensor as it lies there.

    Raises:
        FormatError: no such directory, a truncated, damaged or foreign one, one in online mode, or with norms in its layers.
    """
    divides = _class(path) == "bitlinear"
    found = folder.Tensors.of(path).values
    out: dict[str, QTensor | Tensor] = {}
    for name, tensor in found.items():
        if name.endswith(".weight_scale"):
            whole = name.removesuffix("_scale")
            out[whole] = load(whole, found.get(whole), tensor, divides)
        elif name.endswith(".weight") and tensor.dtype == torch.uint8 and f"{name}_scale" not in found:
            raise FormatError(f"{path}: model.safetensors has {name} packed, and no {name}_scale; the copy is not complete")
        else:
            out.setdefault(name, tensor)
    return out


def read(path: str | Path) -> dict[str, Tensor]:
    """The weights of a directory under their Hugging Face names, fp32: unpacked by transformers, with the step as its layers apply it.

    Raises:
        FormatError: as `qtensors`.
    """
    from transformers.integrations.bitnet import unpack_weights

    divides, checked, found = _class(path) == "bitlinear", qtensors(path), folder.Tensors.of(path).values
    out = {}
    for name, tensor in checked.items():
        if isinstance(tensor, Tensor):
            out[name] = tensor.float() if tensor.is_floating_point() else tensor
            continue
        with _plainly():
            t = unpack_weights(found[name], dtype=torch.float32) if found[name].dtype == torch.uint8 else found[name].float()
        scale = found[f"{name}_scale"].float()
        out[name] = t / scale if divides else t * scale
    return out


def model(path: str | Path) -> nn.Module:
    """The model that transformers loads from the directory in fp32, inputs quantized.

    Raises:
        FormatError: a directory that transformers refuses.
    """
    qtensors(path)
    with _plainly():
        made: Any = folder.load(path, folder.config(path, NAME), torch.float32)
    inner = made.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _plainly():
            return inner(*args, **kwargs)

    made.forward = forward
    return made  # type: ignore[no-any-return]


def near(path: str | Path) -> str:
    """Why the model's logits come only close to the trained ones."""
    return ("transformers multiplies an input by 127 / max|x|, where max|x| / 127 divides it here, and sums products before it applies the steps: "
            "ties of activations fall either way")


def _class(path: str | Path) -> str:
    """The linear class, of a directory that holds codes and nothing else."""
    said = folder.config(path, NAME)["quantization_config"]
    kind, mode = said.get("linear_class", "bitlinear"), said.get("quantization_mode", "offline")
    if kind not in list(TARGETS):
        raise FormatError(f"{path}/config.json has linear_class {kind!r}; it is one of {', '.join(TARGETS)}")
    if mode != "offline" and kind == "autobitlinear":
        raise FormatError(f"{path} is a BitNet checkpoint in {mode!r} mode: it holds latent weights, which its layers quantize anew in each forward, "
                          "and no codes. Take out quantization_config to load it in full precision, and train it with the paper bitnet")
    if said.get("use_rms_norm"):
        raise FormatError(f"{path} has use_rms_norm: a norm stands inside every quantized layer, and its weights alone are not the model")
    return str(kind)


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Uncompiled, without bars, and without the warning that there is no GPU."""
    logger = logging.getLogger("transformers.quantizers.quantizer_bitnet")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.compiler.set_stance("force_eager"), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
