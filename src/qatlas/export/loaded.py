"""A GPTQ or AWQ directory as transformers loads it, through gptqmodel, but computing in fp32.

gptqmodel's layers compute in fp16. So each is taken out after loading, and its own decode, in fp32, put into an nn.Linear: what is compared is what
transformers found in the directory, not the rounding of fp16. Biases, which it loads as fp16, are taken from the file.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.error import FormatError
from .shards import headers, read_json, tensors


def load(path: str | Path, settings: Any, decode: Callable[[Any], Tensor]) -> nn.Module:
    """The model, in eval mode. settings: the `quantization_config` that chooses gptqmodel's plain layers. decode: such a layer -> (in, out) in fp32.

    Raises:
        FormatError: a directory that transformers refuses, or in which it does not find every tensor.
    """
    import transformers

    with silent():
        from gptqmodel.nn_modules.qlinear import BaseQuantLinear

        names = read_json(Path(path) / "config.json").get("architectures")
        cls = getattr(transformers, names[0], None) if isinstance(names, list) and names and isinstance(names[0], str) else None
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            raise FormatError(f"{path}/config.json names {names!r}, which is no class of transformers")
        try:
            both: Any = cls.from_pretrained(Path(path), dtype=torch.float32, local_files_only=True, use_safetensors=True, device_map="cpu",
                                            quantization_config=settings, output_loading_info=True)
            made, info = both
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError, AssertionError, ImportError, TypeError) as error:
            raise FormatError(f"transformers cannot load {path}: {error}") from error
        if lost := sorted(info["missing_keys"]):
            raise FormatError(f"transformers does not find {', '.join(lost[:3])} in {path}; config.json and model.safetensors are not of one save")
        biases = dict(tensors({name: stored for name, stored in headers(path).items() if name.endswith(".bias")}))
        for name, layer in [(n, m) for n, m in made.named_modules() if isinstance(m, BaseQuantLinear)]:
            made.set_submodule(name, _linear(decode(layer).T.contiguous(), biases.get(f"{name}.bias")))
    return made.eval()


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.float(), requires_grad=False)
    return made


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without the banner, the bars and the log lines of gptqmodel."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
