"""Checkpoint: a trained model as data, which is all that an exporter is given.

Exporters stand below the layers and know no module. What they need is the architecture's numbers (the Hugging Face config.json as a dict), the
tensors under their Hugging Face names, each a plain tensor or a QTensor, and where the tokenizer's files lie.

A format that holds the whole computation (ONNX, ExecuTorch) needs a `Graph` too. It is traced above, by model.graph or model.program, from the model
with its weights in full precision: weights have the names of the tensors, and where a quantizer of activations stands there is a node
`qatlas::Quantize` with the attribute `of`, the quantizer's address. What becomes of both is the exporter's work.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.error import FormatError
from ..core.qtensor import QTensor
from ..core.quantizer import Quant

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json",
             "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "preprocessor_config.json", "processor_config.json")
DOMAIN, MARK = "qatlas", "Quantize"                               # the node that stands where activations are quantized


@dataclass
class Signal:
    """A quantizer of activations as data: its Quant, and the step, zero or offset with which it computes. No scale: every input has its own."""

    quant: Quant
    scale: Tensor | None = None
    zero: Tensor | None = None
    offset: Tensor | None = None


@dataclass
class Traced:
    """A computation as torch.export has it. module: a torch.fx.GraphModule in full precision. given: example inputs. open: which of their axes are
    open, as torch.export takes it. names: parameter or buffer of the module -> name of the tensor."""

    module: Any
    given: tuple[Tensor, ...]
    open: Any
    names: dict[str, str]


@dataclass
class Graph:
    """A model's computation. model: an onnx_ir.Model or a Traced, in full precision. signals: address -> Signal, one for each node
    `qatlas::Quantize`."""

    model: Any
    signals: dict[str, Signal]


@dataclass
class Checkpoint:
    """config: config.json as a dict. tensors: parameter name -> Tensor, or QTensor in (out, in) layout. tokenizer: a folder with tokenizer.json and,
    if there is one, tokenizer_config.json; None leaves the vocabulary out. name: what the model is called in the file. inputs: layer -> the Quant of
    its input. signals: addresses of what else is quantized (outputs of layers, signals inside attention); no file of weights holds them.
    graph: the computation, for formats that hold it."""

    config: dict[str, Any]
    tensors: dict[str, Tensor | QTensor]
    tokenizer: Path | None = None
    name: str = "qatlas"
    inputs: dict[str, Quant] = field(default_factory=dict)
    signals: tuple[str, ...] = ()
    graph: Graph | None = None


def vacant(path: Path) -> None:
    """Refuse a path where something is; an empty directory is nothing.

    Raises:
        FormatError: with what to do.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise _taken(path)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A path aside to write a file to, or to make a directory at; it appears under its name when it is whole, or not at all.

    Raises:
        FormatError: something is in the way, at the beginning or at the end; an empty directory gives way to a directory.
    """
    vacant(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    _remove(aside)
    try:
        yield aside
        for file in aside.iterdir() if aside.is_dir() else (aside,):
            with file.open("rb+") as written:
                os.fsync(written.fileno())
        try:
            os.rename(aside, path) if aside.is_dir() else _link(aside, path)
        except OSError:
            if path.exists():
                raise _taken(path) from None
            raise
    finally:
        _remove(aside)


def _taken(path: Path) -> FormatError:
    return FormatError(f"{path} exists; remove it or choose another name")


def _link(aside: Path, path: Path) -> None:
    """Unlike a rename, it fails when someone else has made the file meanwhile."""
    try:
        os.link(aside, path)
    except PermissionError:                                       # a file system without links
        os.rename(aside, path)


def _remove(aside: Path) -> None:
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
