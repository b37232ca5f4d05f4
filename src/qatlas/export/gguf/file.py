"""Writing and reading a GGUF file. The bytes of the header are the gguf package's work, the bytes of the blocks are ours (layout.py).

What each tensor becomes, `plan` tells before anything is written:

    QTensor of a block       the target's type; values in full for f32, f16 and bf16
    QTensor outside          the target's type where that holds it, else the smallest that does (an 8-bit embedding beside a ternary body), else F32
    1-D (norms, biases)      F32
    other plain tensors      F16 where fp16 holds every value, else BF16 where that does, else F32 (embeddings, heads, layers kept in full precision)

A tied head is left out: readers take the embeddings. Nothing is rounded on the way: a tensor that the target cannot hold is refused before the
file is begun, and the file appears under its name only when it is whole (written aside, synced, renamed); one that exists is not overwritten.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.error import FormatError, foreign, unknown
from ...core.qtensor import QTensor
from ..checkpoint import Checkpoint, appearing, vacant
from . import bert, llama
from .architecture import NAMES, Architecture, of
from .fitting import PLAIN, held
from .header import check
from .layout import LAYOUTS, to_bytes
from .vocab import vocabulary

FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32} | {name: layout.file_type for name, layout in LAYOUTS.items()}


def plan(checkpoint: Checkpoint, target: str) -> dict[str, str]:
    """The GGUF name of each tensor to write -> its type there: "F32", "F16", "BF16" or a block's.

    Raises:
        FormatError: a tensor that is missing, that the architecture does not have, or that the target cannot hold; a tokenizer that llama.cpp
            cannot be told.
    """
    if target not in FILE_TYPES:
        raise FormatError(unknown("target", f"gguf:{target}", [f"gguf:{known}" for known in FILE_TYPES]))
    row = of(checkpoint.config)
    names = _names(checkpoint, row)
    row.numbers(checkpoint.config, set(names))
    vocabulary(checkpoint)
    missing, extra = row.expected(checkpoint.config, set(names))
    if missing or extra:
        raise FormatError(f"the tensors are not those of this config: missing {', '.join(sorted(missing)) or 'none'}; "
                          f"unknown {', '.join(sorted(extra)) or 'none'}")
    kinds = {name: "F32" if name in bert.PLAIN else _kind(hf, checkpoint.tensors[hf], target, name.startswith("blk."))
             for name, hf in names.items()}
    rows = checkpoint.tensors[names["token_embd.weight"]].shape[0]
    if rows != checkpoint.config["vocab_size"]:
        raise FormatError(f"the config says vocab_size {checkpoint.config['vocab_size']}, the embeddings have {rows} rows")
    return kinds


def write(checkpoint: Checkpoint, path: str | Path, target: str) -> Path:
    """The checkpoint as a GGUF file that llama.cpp, transformers and the gguf package read.

    Args:
        path: the file to make; must not exist.
        target: one of TARGETS.

    Raises:
        FormatError: what cannot be expressed (see `plan` and vocab.py), or a file that is in the way. Then nothing is left behind.
    """
    import gguf

    path = Path(path)
    vacant(path)
    row = of(checkpoint.config)
    kinds, names = plan(checkpoint, target), _names(checkpoint, row)
    keys = {"general.name": checkpoint.name, "general.quantization_version": 2, "general.file_type": FILE_TYPES[target],
            **_numbers(checkpoint, row, set(names)), **vocabulary(checkpoint)}
    with appearing(path) as aside:
        writer = gguf.GGUFWriter(aside, row.name)
        for key, value in keys.items():
            _add(writer, key, value)
        for name, kind in kinds.items():
            rows, raw = _bytes(name, names[name], checkpoint, kind, row)
            writer.add_tensor(name, rows, raw_dtype=raw)
        factors = llama.rotary_factors(checkpoint.config) if row.turned else None
        if factors is not None:
            writer.add_tensor(llama.FREQUENCIES, factors.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def read(path: str | Path) -> dict[str, Tensor]:
    """The weights of a GGUF file under their Hugging Face names, fp32, through gguf.GGUFReader and gguf.dequantize.

    Raises:
        FormatError: no file, a truncated or foreign one, or another architecture.
    """
    reader = open_file(path)
    with foreign(f"{path} is no whole GGUF file; write it anew"):
        return _read(path, reader)


def _read(path: str | Path, reader: Any) -> dict[str, Tensor]:
    import gguf

    architecture = field(reader, "general.architecture")
    if architecture not in NAMES:
        raise FormatError(f"{path} holds the architecture {architecture!r}; the GGUF reader knows {', '.join(NAMES)}")
    row = NAMES[architecture]
    heads, kv_heads = (field(reader, f"{architecture}.attention.{key}") for key in ("head_count", "head_count_kv"))
    out, names = {}, {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        if tensor.name == llama.FREQUENCIES:                      # follows from the config
            continue
        name = row.to_hf(tensor.name, names)
        if name is None:
            raise FormatError(f"{path} holds a tensor {tensor.name!r} that {architecture} does not have")
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        count = row.heads_of(tensor.name, heads, kv_heads or heads)
        out[name] = row.unshifted(name, values if count is None else llama.unpermute(values, count))
    return out


def types(path: str | Path) -> dict[str, int]:
    """How many tensors of each type a file holds, the most frequent first."""
    return dict(Counter(tensor.tensor_type.name for tensor in open_file(path).tensors).most_common())


def open_file(path: str | Path) -> Any:
    """gguf.GGUFReader, with the ways in which it fails on a truncated or foreign file said in words."""
    import gguf

    if not Path(path).is_file():
        raise FormatError(f"there is no GGUF file {path}")
    with foreign(f"{path} is no whole GGUF file; it is truncated or of another kind, write it anew"):
        check(path)
        reader = gguf.GGUFReader(path)
    if not reader.tensors:
        raise FormatError(f"{path} is a GGUF file without tensors; it is truncated or a vocabulary only")
    return reader


def field(reader: Any, key: str) -> Any:
    """One value of the header, or None."""
    with foreign(f"the header of this GGUF file says nothing readable of {key}; it is damaged, write it anew"):
        found = reader.get_field(key)
        return None if found is None else found.contents()


def kept(config: dict[str, Any], name: str, tensor: Tensor) -> Tensor:
    """A plain tensor as `read` gives it back: itself, but for norms that are stored as 1 + w."""
    return of(config).kept(name, tensor)


def _numbers(checkpoint: Checkpoint, row: Architecture, names: set[str]) -> dict[str, Any]:
    """What the config says, and the pooling that a folder says, which a classifier overrules."""
    return {**(bert.pooling(checkpoint.tokenizer) if row.name == "bert" else {}), **row.numbers(checkpoint.config, names)}


def _names(checkpoint: Checkpoint, row: Architecture) -> dict[str, str]:
    """GGUF name -> Hugging Face name, in the order of the checkpoint; a tied head left out."""
    tied = checkpoint.config.get("tie_word_embeddings", False)
    out = {}
    for hf in checkpoint.tensors:
        if hf.endswith(llama.SKIPPED) or (tied and hf == "lm_head.weight"):
            continue
        name = row.to_gguf(hf)
        if name is None:
            raise FormatError(f"GGUF's {row.name} has no tensor {hf!r}")
        out[name] = hf
    return out


def _kind(name: str, tensor: Any, target: str, body: bool) -> str:
    """The type of one tensor, or the refusal."""
    if isinstance(tensor, Tensor):
        if not torch.isfinite(tensor).all():
            raise FormatError(f"{name} holds NaN or infinity")
        if target == "f32" or tensor.dim() < 2 or tensor.dtype == torch.float64:
            return "F32"
        able = [kind for kind in ("f16", "bf16") if torch.equal(tensor.to(getattr(torch, PLAIN[kind])).to(tensor.dtype), tensor)]
        if target in ("f16", "bf16"):
            if target in able:
                return target.upper()
            named = {"f16": "fp16", "bf16": "bf16"}[target]
            raise FormatError(f"{name} holds values that {named} would round; write gguf:f32, or round the model first "
                              f"(model.to(torch.{PLAIN[target]}))")
        return (able[0] if able else "f32").upper()
    shape = tuple(tensor.dequantize().shape)
    reason = held(tensor, target, shape)
    if not isinstance(reason, str):
        return target.upper()
    if body:
        raise FormatError(f"gguf:{target} cannot hold {name}, shape {tuple(tensor.shape)}: {reason}")
    return next((other for other in (*LAYOUTS, "f16", "bf16") if not isinstance(held(tensor, other, shape), str)), "f32").upper()


def _bytes(name: str, hf: str, checkpoint: Checkpoint, kind: str, row: Architecture) -> tuple[np.ndarray, Any]:
    """One tensor in GGUF order: plain values, or (rows, bytes of a row) with the block type. Rows move whole, whatever they hold."""
    import gguf

    config = checkpoint.config
    tensor: Any = checkpoint.tensors[hf]
    heads = row.heads_of(name, config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"])
    order = (lambda rows: rows) if heads is None else (lambda rows: llama.permute(rows, heads))
    if kind.lower() in LAYOUTS:
        return order(packed(tensor, kind.lower()).cpu()).numpy(), gguf.GGMLQuantizationType[kind]
    values = order((row.stored(hf, tensor) if isinstance(tensor, Tensor) else tensor.dequantize()).detach().cpu())
    if kind == "BF16":                                            # numpy has no such type
        return to_bytes(values, "bfloat16").flatten(-2).numpy(), gguf.GGMLQuantizationType.BF16
    return values.to(getattr(torch, PLAIN[kind.lower()])).contiguous().numpy(), None


def packed(tensor: QTensor, target: str) -> Tensor:
    """A QTensor (out, in) -> the blocks of its rows, (out, bytes) uint8."""
    own = held(tensor, target)
    if not isinstance(own, QTensor):
        raise FormatError(f"gguf:{target} cannot hold this tensor: {own}")
    return LAYOUTS[target].pack(own)


def _add(writer: Any, key: str, value: Any) -> None:
    """One key, in the type that llama.cpp reads it with."""
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
