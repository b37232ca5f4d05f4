"""onnxruntime, as the reader of our files. Optimizations are off: by default it fuses DequantizeLinear with the product behind it into kernels that
round activations to 8 bits, or that saturate where a chip lacks VNNI, and then it does not compute what the file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.error import FormatError


def session(model: str | bytes, optimized: bool = False) -> Any:
    """An onnxruntime session on the CPU, one thread.

    Raises:
        FormatError: what onnxruntime cannot load, or the extra is missing.
    """
    try:
        import onnxruntime
    except ImportError:
        raise FormatError("reading ONNX needs onnxruntime, which is not installed: pip install 'qatlas[onnx]'") from None
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise FormatError(f"onnxruntime cannot load this file: {str(error).strip().splitlines()[0]}") from None


def answers(path: str | Path, asked: list[Tensor], optimized: bool = False) -> Tensor:
    """(rows, vocabulary or classes) fp32: what onnxruntime computes for each input, of a language model after its last token.

    asked: ids (rows, tokens) or pixels; the mask of a sentence is all ones, its type 0.

    Raises:
        FormatError: a file that onnxruntime cannot run.
    """
    if not Path(path).is_file():
        raise FormatError(f"there is no ONNX file {path}")
    runs = session(str(path), optimized)
    names = [given.name for given in runs.get_inputs()]
    out = []
    for rows in asked:
        more = {"attention_mask": torch.ones_like(rows), "token_type_ids": torch.zeros_like(rows)}
        if missing := [name for name in names[1:] if name not in more]:
            raise FormatError(f"{path} takes {', '.join(names)}; nobody knows what {missing[0]} would be")
        feed = {name: rows if i == 0 else more[name] for i, name in enumerate(names)}
        try:
            found = torch.from_numpy(runs.run(None, {name: value.numpy() for name, value in feed.items()})[0])
        except Exception as error:
            raise FormatError(f"onnxruntime cannot run {path}: {str(error).strip().splitlines()[0]}") from None
        out.append(found[:, -1] if found.dim() == 3 else found)
    return torch.cat(out)
