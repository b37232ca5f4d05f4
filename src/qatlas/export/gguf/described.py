"""The config of the model in a GGUF file, as transformers wants it: architecture.py backwards, for Llama, Qwen 2 and 3, Gemma 1 to 3.

transformers has a reader for that too; it passes over rotary scaling, biases, the numbers of rope_freqs.weight and, of some architectures, the size
of heads, which would be another model with the same weights. Of rope_freqs.weight we say which Llama 3 scaling it is, by trying those that were
published (and comparing every number), and refuse it otherwise. Numbers of a header are fp32; the config gets the shortest decimal that is the same
fp32 number (1e-05, not 9.999999747378752e-06).

What a header does not say, and llama.cpp takes as known, the config says: the windows' pattern, the activation, the factor of Gemma's q
(1 / sqrt(head size); of the 27B sizes, which llama.cpp tells by their number of layers, width / heads), Qwen's biases. Mistral's files say "llama",
and come back as Llama, which computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.error import FormatError
from . import llama
from .architecture import LARGE, PERIOD
from .file import field
from .qtensors import count, opened, plain

LLAMA3 = tuple({"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
               for factor in (8.0, 32.0))
COUNTS = ("embedding_length", "block_count", "feed_forward_length", "context_length", "attention.head_count", "attention.head_count_kv")
GELU = "gelu_pytorch_tanh"                                        # llama.cpp's


def config(path: str | Path) -> dict[str, Any]:
    """config.json of the model, as a dict.

    Raises:
        FormatError: a header that lacks a number, or describes a model that transformers' class of that architecture is not.
    """
    reader, row = opened(path)
    names = {tensor.name: [int(n) for n in tensor.shape] for tensor in reader.tensors}
    counts = {key: count(path, reader, key) for key in COUNTS}
    heads = counts["attention.head_count"]
    size = field(reader, f"{row.name}.attention.key_length") or counts["embedding_length"] // heads
    for key in (f"{row.name}.rope.dimension_count", f"{row.name}.attention.value_length"):
        if (other := field(reader, key) or size) != size:
            raise FormatError(f"{path} says {key} {other}, and heads of {size}; transformers' {row.name} has one size for all")
    if field(reader, f"{row.name}.expert_count"):
        raise FormatError(f"{path} holds a mixture of {field(reader, f'{row.name}.expert_count')} experts; qatlas reads dense models")
    if len(table := names.get("token_embd.weight", [])) != 2:
        raise FormatError(f"{path} has no token_embd.weight; it is a vocabulary or a part of a model")
    said = {
        "model_type": row.name, "hidden_size": counts["embedding_length"],
        "intermediate_size": counts["feed_forward_length"], "num_hidden_layers": counts["block_count"], "num_attention_heads": heads,
        "num_key_value_heads": counts["attention.head_count_kv"], "head_dim": size, "max_position_embeddings": counts["context_length"],
        "rms_norm_eps": _number(path, reader, f"{row.name}.attention.layer_norm_rms_epsilon"), "vocab_size": table[1],
        "tie_word_embeddings": "output.weight" not in names,
        **{f"{name}_token_id": value for name in ("bos", "eos") if (value := field(reader, f"tokenizer.ggml.{name}_token_id")) is not None}}
    base = _number(path, reader, f"{row.name}.rope.freq_base", 10000.0)
    said["rope_parameters"] = {"rope_theta": base, **_rotary(path, reader, row, said | {"rope_theta": base})}
    return said | OWN[row.name](path, reader, said, set(names))


Own = Callable[[str | Path, Any, dict[str, Any], set[str]], dict[str, Any]]


def _llama(path: str | Path, reader: Any, said: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "attention_bias": "blk.0.attn_q.bias" in names,
            "mlp_bias": "blk.0.ffn_gate.bias" in names}


def _qwen2(path: str | Path, reader: Any, said: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "use_sliding_window": False}


def _qwen3(path: str | Path, reader: Any, said: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {"architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu", "use_sliding_window": False, "attention_bias": False}


def _gemma(path: str | Path, reader: Any, said: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {"architectures": ["GemmaForCausalLM"], "hidden_act": GELU, "attention_bias": False}


def _gemma2(path: str | Path, reader: Any, said: dict[str, Any], names: set[str]) -> dict[str, Any]:
    caps = {key: _number(path, reader, f"gemma2.{key}") for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    return {"architectures": ["Gemma2ForCausalLM"], **_windows(path, reader, said), **caps}


def _gemma3(path: str | Path, reader: Any, said: dict[str, Any], names: set[str]) -> dict[str, Any]:
    if (cap := field(reader, "gemma3.final_logit_softcapping")) is not None:
        raise FormatError(f"{path} caps its logits at {cap}, which no published Gemma 3 does")
    near = {"rope_type": "default", "rope_theta": _number(path, reader, "gemma3.rope.freq_base_swa", 10000.0)}
    return {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], **_windows(path, reader, said), "attn_logit_softcapping": None,
            "final_logit_softcapping": None, "rope_parameters": {"full_attention": said["rope_parameters"], "sliding_attention": near}}


def _windows(path: str | Path, reader: Any, said: dict[str, Any]) -> dict[str, Any]:
    """Of Gemma 2 and 3: the windows, and what both have."""
    name, layers = said["model_type"], said["num_hidden_layers"]
    period = field(reader, f"{name}.attention.sliding_window_pattern")
    if period not in (None, PERIOD[name]):
        raise FormatError(f"{path} says {name}.attention.sliding_window_pattern {period}; qatlas reads {PERIOD[name]}, that of the published models")
    kinds = ["full_attention" if (i + 1) % PERIOD[name] == 0 else "sliding_attention" for i in range(layers)]
    factor = said["hidden_size"] // said["num_attention_heads"] if layers == LARGE[name] else said["head_dim"]
    return {"hidden_activation": GELU, "attention_bias": False, "query_pre_attn_scalar": factor, "layer_types": kinds,
            "sliding_window": count(path, reader, "attention.sliding_window")}


OWN: dict[str, Own] = {"llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "gemma": _gemma, "gemma2": _gemma2, "gemma3": _gemma3}


def _number(path: str | Path, reader: Any, key: str, default: float | None = None) -> float:
    found = field(reader, key)
    found = default if found is None else found
    if not isinstance(found, int | float) or not np.isfinite(found):
        raise FormatError(f"{path} says {key} = {found!r}, which is no number")
    return float(str(np.float32(found)))


def _rotary(path: str | Path, reader: Any, row: Any, said: dict[str, Any]) -> dict[str, Any]:
    """The scaling of rotary positions: what the header says, and what the factors are."""
    kind = field(reader, f"{row.name}.rope.scaling.type") or "none"
    if kind not in ("none", "linear") or (kind == "linear" and row.name in ("gemma", "gemma2")):
        raise FormatError(f"{path} says rotary scaling {kind!r}; of {row.name} qatlas reads none"
                          + {"llama": ", linear, and the factors of Llama 3", "gemma": "", "gemma2": ""}.get(row.name, " and linear"))
    own = {"rope_type": "default"} if kind == "none" else {"rope_type": "linear", "factor": _number(path, reader, f"{row.name}.rope.scaling.factor")}
    factors = next((tensor for tensor in reader.tensors if tensor.name == llama.FREQUENCIES), None)
    if factors is None:
        return own
    stored = plain(f"{path}: {llama.FREQUENCIES}", factors).float()
    for known in _published(stored) if row.turned else ():
        ours = llama.rotary_factors(said | {"rope_parameters": {**known, "rope_theta": said["rope_theta"]}})
        if kind == "none" and ours is not None and ours.shape == stored.shape and torch.allclose(ours, stored, rtol=1e-6, atol=0):
            return known
    raise FormatError(f"{path} holds {llama.FREQUENCIES} that is no published scaling of Llama 3 (factor 8 or 32 over 8192 positions), "
                      "and the file does not say which; convert the model from its Hugging Face form")


def _published(stored: Tensor) -> Iterator[dict[str, Any]]:
    yield from LLAMA3
    yield {**LLAMA3[0], "factor": float(stored.max())}
