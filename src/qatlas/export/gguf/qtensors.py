"""The other direction: a GGUF file, ours or anyone's, as QTensors under Hugging Face names: where training can go on. Its config: described.py.

Each tensor of a type of layout.py becomes a QTensor in the block's own form, rows of Llama's q and k back in Hugging Face order, whole, with their
codes and steps; F32, F16 and BF16 stay as they are, but for Gemma's norms, which GGUF holds as 1 + w. `QTensor.dequantize()` is what
`gguf.dequantize` gives, bit for bit. What has no such form is refused by name, never dequantized in silence: the types with lattice codebooks (IQ1,
IQ2, IQ3), IQ4_XS, NVFP4, a ternary block with a fourth value (TQ2_0 code 3), a model in several files, experts, steps that are NaN. So is BERT: its
file leaves out what the encoder was trained for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.error import FormatError
from ...core.grid import Ternary
from ...core.qtensor import QTensor
from . import llama
from .architecture import NAMES, Architecture
from .file import field, open_file
from .layout import LAYOUTS

MAGIC = b"GGUF"
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
READ = {name: row for name, row in NAMES.items() if name != "bert"}


def holds(path: str | Path) -> bool:
    """Whether a file is of this format, by its first bytes alone."""
    if not Path(path).is_file():                                  # nor is a pipe, at which a reader would wait
        return False
    try:
        with Path(path).open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def qtensors(path: str | Path) -> dict[str, QTensor | Tensor]:
    """Hugging Face name -> QTensor of every tensor in blocks, plain tensors as they are; a tied head is not there.

    Raises:
        FormatError: no file, a truncated or foreign one, another architecture, a type or a tensor without a QTensor form.
    """
    reader, row = opened(path)
    heads, kv_heads = (count(path, reader, key) for key in ("attention.head_count", "attention.head_count_kv"))
    out: dict[str, QTensor | Tensor] = {}
    names = {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        if tensor.name == llama.FREQUENCIES:
            continue
        name = row.to_hf(tensor.name, names)
        if name is None:
            raise FormatError(f"{path} holds a tensor {tensor.name!r} that {row.name} does not have")
        found = plain(f"{path}: {tensor.name}", tensor)
        turned = row.heads_of(tensor.name, heads, kv_heads)
        if turned is not None and (found.shape[0] % (2 * turned) or not found.shape[0]):
            raise FormatError(f"{path}: {tensor.name} has {found.shape[0]} rows, which are no {turned} heads of pairs")
        rows = found if turned is None else llama.unpermute(found, turned)
        kind = tensor.tensor_type.name.lower()
        out[name] = _checked(f"{path}: {tensor.name}", LAYOUTS[kind].unpack(rows)) if kind in LAYOUTS else row.unshifted(name, rows)
    return out


def tokenizer(path: str | Path) -> Any:
    """The tokenizer of the header, as transformers reads it; None where the header has none. (Its ids are those of the tokenizers that we write.)

    Raises:
        FormatError: a vocabulary that transformers cannot read.
    """
    from transformers import AutoTokenizer

    if (kind := field(opened(path)[0], "tokenizer.ggml.model")) in (None, "none", "no_vocab"):
        return None
    try:
        return AutoTokenizer.from_pretrained(Path(path).parent, gguf_file=Path(path).name, local_files_only=True)
    except Exception as error:                                    # what it raises differs from vocabulary to vocabulary
        raise FormatError(f"{path} has a vocabulary of kind {kind!r} that transformers cannot read ({str(error)[:200]}); "
                          "put tokenizer.json of the model beside the file") from error


def opened(path: str | Path) -> tuple[Any, Architecture]:
    """The reader of a whole file, and the row of its architecture."""
    reader = open_file(path)
    architecture = field(reader, "general.architecture")
    if architecture not in READ:
        raise FormatError(f"{path} holds the architecture {architecture!r}; training can start from {', '.join(READ)}")
    if (parts := field(reader, "split.count") or 1) != 1:
        raise FormatError(f"{path} is one of {parts} files of a model; join them first: llama-gguf-split --merge")
    return reader, READ[architecture]


def count(path: str | Path, reader: Any, key: str) -> int:
    """A positive number of the header, under its architecture; key and value heads are as many as the others where nothing is said."""
    whole = f"{field(reader, 'general.architecture')}.{key}"
    found = field(reader, whole)
    if found is None and key == "attention.head_count_kv":
        return count(path, reader, "attention.head_count")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise FormatError(f"{path} says {whole} = {found!r}, which is no number of its own for all layers")
    return found


def plain(where: str, tensor: Any) -> Tensor:
    """A plain tensor, or the bytes of blocks (rows, bytes), as they lie in the file."""
    kind = tensor.tensor_type.name
    if kind.lower() not in LAYOUTS and kind not in PLAIN:
        raise FormatError(f"{where} is of type {kind}, whose values are no grid of ours times a step; qatlas reads "
                          f"{', '.join([*PLAIN, *(layout.type for layout in LAYOUTS.values())])}. Quantize the model to one of these")
    data = torch.from_numpy(np.array(tensor.data))
    if kind == "BF16":
        data = data.contiguous().view(torch.bfloat16)
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if kind in PLAIN:
        if tuple(data.shape) != shape or not bool(torch.isfinite(data).all()):
            raise FormatError(f"{where} has shape {tuple(data.shape)} in the file and {shape} in its header" if tuple(data.shape) != shape else
                              f"{where} holds NaN or infinity")
        return data
    layout = LAYOUTS[kind.lower()]
    if len(shape) != 2 or shape[1] % layout.size or data.dtype != torch.uint8 \
            or tuple(data.shape) != (shape[0], shape[1] // layout.size * sum(layout.widths().values())):
        raise FormatError(f"{where} is {shape} of {kind}: {data.dtype} of shape {tuple(data.shape)} are no whole blocks of {layout.size}")
    return data


def _checked(where: str, q: QTensor) -> QTensor:
    """Refuse steps that are no numbers, and codes that are no values."""
    for name, part in (("step", q.steps), ("offset", q.offsets)):
        if part is not None and not bool(torch.isfinite(part).all()):
            raise FormatError(f"{where} has a {name} that is NaN or infinite")
    if isinstance(q.grid, Ternary) and bool((q.codes > 2).any()):
        raise FormatError(f"{where} has ternary blocks with a fourth value, {int((q.codes > 2).sum())} times; no grid of ours is -1 0 1 2")
    return q
