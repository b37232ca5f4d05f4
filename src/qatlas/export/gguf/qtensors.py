"""The other direction: a GGUF file, ours or anyone's, as QTensors under Hugging Face names, and the config of its model: where training can go on.

Each tensor of a type of layout.py becomes a QTensor in the block's own form, rows of q and k back in Hugging Face order, whole, with their codes and
steps; F32, F16 and BF16 stay as they are. `QTensor.dequantize()` is what `gguf.dequantize` gives, bit for bit. What has no such form is refused by
name, never dequantized in silence: the types with lattice codebooks (IQ1, IQ2, IQ3), IQ4_XS, NVFP4, a ternary
block with a fourth value (TQ2_0 code 3), a model in several files, experts, steps that are NaN.

The config is made from the header, as llama.py makes the header from a config. transformers has a reader for that too; it passes over rotary scaling,
biases and the numbers of rope_freqs.weight, which would be another model with the same weights. Of rope_freqs.weight we say which Llama 3 scaling
it is, by trying those that were published (and comparing every number), and refuse it otherwise. Numbers of a header are fp32; the config gets the
shortest decimal that is the same fp32 number (1e-05, not 9.999999747378752e-06).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.error import FormatError
from ...core.grid import Ternary
from ...core.qtensor import QTensor
from . import llama
from .file import field, open_file
from .layout import LAYOUTS

MAGIC = b"GGUF"
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LLAMA3 = tuple({"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
               for factor in (8.0, 32.0))


def holds(path: str | Path) -> bool:
    """Whether a file is of this format, by its first bytes alone."""
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
    reader = _opened(path)
    heads, kv_heads = (_count(path, reader, key) for key in ("attention.head_count", "attention.head_count_kv"))
    out: dict[str, QTensor | Tensor] = {}
    for tensor in reader.tensors:
        if tensor.name == llama.FREQUENCIES:
            continue
        name = llama.to_hf(tensor.name)
        if name is None:
            raise FormatError(f"{path} holds a tensor {tensor.name!r} that Llama does not have")
        found = _tensor(f"{path}: {tensor.name}", tensor)
        count = llama.heads_of(tensor.name, heads, kv_heads)
        if count is not None and (found.shape[0] % (2 * count) or not found.shape[0]):
            raise FormatError(f"{path}: {tensor.name} has {found.shape[0]} rows, which are no {count} heads of pairs")
        rows = found if count is None else llama.unpermute(found, count)
        kind = tensor.tensor_type.name.lower()
        out[name] = _checked(f"{path}: {tensor.name}", LAYOUTS[kind].unpack(rows)) if kind in LAYOUTS else rows
    return out


def config(path: str | Path) -> dict[str, Any]:
    """config.json of the model, as a dict.

    Raises:
        FormatError: a header that lacks a number, or describes a model that transformers' Llama is not.
    """
    reader = _opened(path)
    names = {tensor.name: [int(n) for n in tensor.shape] for tensor in reader.tensors}
    count = {key: _count(path, reader, key) for key in ("embedding_length", "block_count", "feed_forward_length", "context_length",
                                                        "attention.head_count", "attention.head_count_kv")}
    heads = count["attention.head_count"]
    size = field(reader, "llama.attention.key_length") or count["embedding_length"] // heads
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if (other := field(reader, key) or size) != size:
            raise FormatError(f"{path} says {key} {other}, and heads of {size}; transformers' Llama has one size for all")
    if field(reader, "llama.expert_count"):
        raise FormatError(f"{path} holds a mixture of {field(reader, 'llama.expert_count')} experts; qatlas reads dense Llama")
    if len(table := names.get("token_embd.weight", [])) != 2:
        raise FormatError(f"{path} has no token_embd.weight; it is a vocabulary or a part of a model")
    said = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": count["embedding_length"],
        "intermediate_size": count["feed_forward_length"], "num_hidden_layers": count["block_count"], "num_attention_heads": heads,
        "num_key_value_heads": count["attention.head_count_kv"], "head_dim": size, "max_position_embeddings": count["context_length"],
        "rms_norm_eps": _number(path, reader, "llama.attention.layer_norm_rms_epsilon"), "vocab_size": table[1],
        "tie_word_embeddings": "output.weight" not in names, "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_gate.bias" in names,
        **{f"{name}_token_id": value for name in ("bos", "eos") if (value := field(reader, f"tokenizer.ggml.{name}_token_id")) is not None}}
    base = _number(path, reader, "llama.rope.freq_base", 10000.0)
    return said | {"rope_parameters": {"rope_theta": base, **_rotary(path, reader, said | {"rope_theta": base})}}


def tokenizer(path: str | Path) -> Any:
    """The tokenizer of the header, as transformers reads it; None where the header has none. (Its ids are those of the tokenizers that we write.)

    Raises:
        FormatError: a vocabulary that transformers cannot read.
    """
    from transformers import AutoTokenizer

    if (kind := field(_opened(path), "tokenizer.ggml.model")) in (None, "none", "no_vocab"):
        return None
    try:
        return AutoTokenizer.from_pretrained(Path(path).parent, gguf_file=Path(path).name, local_files_only=True)
    except Exception as error:                                    # what it raises differs from vocabulary to vocabulary
        raise FormatError(f"{path} has a vocabulary of kind {kind!r} that transformers cannot read ({str(error)[:200]}); "
                          "put tokenizer.json of the model beside the file") from error


def _opened(path: str | Path) -> Any:
    """The reader of a whole Llama file."""
    reader = open_file(path)
    architecture = field(reader, "general.architecture")
    if architecture not in llama.ARCHITECTURES:
        raise FormatError(f"{path} holds the architecture {architecture!r}; the GGUF reader knows {', '.join(llama.ARCHITECTURES)}")
    if (parts := field(reader, "split.count") or 1) != 1:
        raise FormatError(f"{path} is one of {parts} files of a model; join them first: llama-gguf-split --merge")
    return reader


def _count(path: str | Path, reader: Any, key: str) -> int:
    """A positive number of the header; key and value heads are as many as the others where nothing is said."""
    found = field(reader, f"llama.{key}")
    if found is None and key == "attention.head_count_kv":
        return _count(path, reader, "attention.head_count")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise FormatError(f"{path} says llama.{key} = {found!r}, which is no number of its own for all layers")
    return found


def _number(path: str | Path, reader: Any, key: str, default: float | None = None) -> float:
    found = field(reader, key)
    found = default if found is None else found
    if not isinstance(found, int | float) or not np.isfinite(found):
        raise FormatError(f"{path} says {key} = {found!r}, which is no number")
    return float(str(np.float32(found)))


def _rotary(path: str | Path, reader: Any, said: dict[str, Any]) -> dict[str, Any]:
    """The scaling of rotary positions: what the header says, and what the factors are."""
    kind = field(reader, "llama.rope.scaling.type") or "none"
    if kind not in ("none", "linear"):
        raise FormatError(f"{path} says rotary scaling {kind!r}; qatlas reads none, linear, and the factors of Llama 3")
    own = {"rope_type": "default"} if kind == "none" else {"rope_type": "linear", "factor": _number(path, reader, "llama.rope.scaling.factor")}
    factors = next((tensor for tensor in reader.tensors if tensor.name == llama.FREQUENCIES), None)
    if factors is None:
        return own
    stored = _tensor(f"{path}: {llama.FREQUENCIES}", factors).float()
    for known in _published(stored):
        ours = llama.rotary_factors(said | {"rope_parameters": {**known, "rope_theta": said["rope_theta"]}})
        if kind == "none" and ours is not None and ours.shape == stored.shape and torch.allclose(ours, stored, rtol=1e-6, atol=0):
            return known
    raise FormatError(f"{path} holds {llama.FREQUENCIES} that is no published scaling of Llama 3 (factor 8 or 32 over 8192 positions), "
                      "and the file does not say which; convert the model from its Hugging Face form")


def _published(stored: Tensor) -> Iterator[dict[str, Any]]:
    yield from LLAMA3
    yield {**LLAMA3[0], "factor": float(stored.max())}


def _tensor(where: str, tensor: Any) -> Tensor:
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
