"""Checkpoint: a trained model as data, which is all that an exporter is given.

Exporters stand below the layers and know no module. What they need is the architecture's numbers (the Hugging Face config.json as a dict), the
tensors under their Hugging Face names, each a plain tensor or a QTensor, and where the tokenizer's files lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.qtensor import QTensor


@dataclass
class Checkpoint:
    """config: config.json as a dict. tensors: parameter name -> Tensor, or QTensor in (out, in) layout. tokenizer: a folder with tokenizer.json and,
    if there is one, tokenizer_config.json; None leaves the vocabulary out. name: what the model is called in the file."""

    config: dict[str, Any]
    tensors: dict[str, Tensor | QTensor]
    tokenizer: Path | None = None
    name: str = "qatlas"
