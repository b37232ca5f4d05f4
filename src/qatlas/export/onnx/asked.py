"""Ask an engine about a whole file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.error import FormatError
from . import runtime


def answers(path: str | Path, asked: list[Tensor], engine: Any = runtime) -> Tensor:
    """(rows, vocabulary or classes) fp32: what an engine computes for each input, of a language model after its last token.

    asked: ids (rows, tokens) or pixels; the mask of a sentence is all ones, its type 0. engine: one of ENGINES.

    Raises:
        FormatError: a file that the engine cannot load or run.
    """
    if not Path(path).is_file():                                  # nor is a pipe, at which an engine would wait
        raise FormatError(f"there is no ONNX file {path}")
    ask = engine.start(str(path))
    names = ask.inputs
    out = []
    for rows in asked:
        more = {"attention_mask": torch.ones_like(rows), "token_type_ids": torch.zeros_like(rows)}
        if missing := [name for name in names[1:] if name not in more]:
            raise FormatError(f"{path} takes {', '.join(names)}; nobody knows what {missing[0]} would be")
        feed = {name: rows if i == 0 else more[name] for i, name in enumerate(names)}
        found = torch.from_numpy(ask({name: value.numpy() for name, value in feed.items()})[0])
        out.append(found[:, -1] if found.dim() == 3 else found)
    return torch.cat(out)
