"""The Llama architecture in GGUF: names, numbers, and the order of the rows of q and k.

llama.cpp turns neighbouring pairs (2i, 2i + 1) of a head by one angle, as Meta's code did; Hugging Face turns the pairs (i, i + D/2). The same model
needs its q and k rows in another order: a head's D rows are two halves of D/2, and GGUF lists them alternately,

    gguf row 2 i + h  =  hugging face row h D/2 + i        (H, 2, D/2, ...) -> (H, D/2, 2, ...)

Rows move whole, with their codes and their steps; v, o and all others stay. Forgetting this leaves a model that loads, runs and talks nonsense.

Source: convert_hf_to_gguf.py of llama.cpp (LlamaModel.permute, and the keys it writes).
Rotary scaling: "default", "linear" and "llama3" are expressed, the last as a tensor rope_freqs.weight (D/2,) by which llama.cpp divides each pair's
frequency; others are refused by name. transformers' GGUF reader overlooks rope_freqs and so reads a llama3 file as one without scaling.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from ...core.error import FormatError

ARCHITECTURES = ("llama",)
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ROPES = ("default", "linear", "llama3")
FREQUENCIES = "rope_freqs.weight"
SKIPPED = ("rotary_emb.inv_freq", "embeddings.position_ids")      # buffers that old checkpoints carry; they follow from the config


def to_gguf(name: str, parts: dict[str, str] = PARTS, ends: dict[str, str] = ENDS, layers: str = "model.layers") -> str | None:
    """A Hugging Face parameter name -> GGUF's, or None for one that the architecture (by default Llama) does not have.

    >>> to_gguf("model.layers.3.self_attn.q_proj.weight")
    'blk.3.attn_q.weight'
    """
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in ends:
        return f"{ends[stem]}.{kind}"
    match = re.fullmatch(re.escape(layers) + r"\.(\d+)\.(.+)", stem)
    return f"blk.{match[1]}.{parts[match[2]]}.{kind}" if match and match[2] in parts else None


def to_hf(name: str, parts: dict[str, str] = PARTS, ends: dict[str, str] = ENDS, layers: str = "model.layers") -> str | None:
    """The inverse of `to_gguf`.

    >>> to_hf("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    end = {gguf: hf for hf, gguf in ends.items()}.get(stem)
    if end is not None:
        return f"{end}.{kind}"
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
    part = {gguf: hf for hf, gguf in parts.items()}.get(match[2]) if match else None
    return f"{layers}.{match[1]}.{part}.{kind}" if match and part else None


def part_of(name: str) -> str:
    """The part that a GGUF module is, without its layer.

    >>> part_of("blk.3.attn_q"), part_of("cls.output")
    ('attn_q', 'cls.output')
    """
    return re.sub(r"^blk\.\d+\.", "", name)


def heads_of(name: str, heads: int, kv_heads: int) -> int | None:
    """How many heads share the rows of a tensor (GGUF name) that is permuted; None for one that is not."""
    return {"attn_q": heads, "attn_k": kv_heads}.get(name.split(".")[-2])


def permute(rows: Tensor, heads: int) -> Tensor:
    """Hugging Face order -> GGUF order. rows (H D, ...).

    >>> import torch
    >>> permute(torch.arange(8), 2)
    tensor([0, 2, 1, 3, 4, 6, 5, 7])
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `permute`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def numbers(config: dict[str, Any], name: str = "llama", ropes: tuple[str, ...] = ROPES) -> dict[str, int | float | str]:
    """config.json -> the keys that llama.cpp needs to build the model. name: the architecture, in front of each; ropes: its rotary scalings.

    Raises:
        FormatError: another activation or rotary scaling than the architecture has.
    """
    if config.get("hidden_act", "silu") != "silu":
        raise FormatError(f"GGUF's {name} uses silu, the config says hidden_act={config['hidden_act']!r}")
    try:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        size = config.get("head_dim") or width // heads
        rope = rotary(config, name, ropes)
        return {
            f"{name}.context_length": config["max_position_embeddings"],
            f"{name}.embedding_length": width,
            f"{name}.block_count": config["num_hidden_layers"],
            f"{name}.feed_forward_length": config["intermediate_size"],
            f"{name}.attention.head_count": heads,
            f"{name}.attention.head_count_kv": config.get("num_key_value_heads") or heads,
            f"{name}.attention.key_length": size,
            f"{name}.attention.value_length": size,
            f"{name}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
            f"{name}.rope.dimension_count": size,
            f"{name}.vocab_size": config["vocab_size"],
            **rope,
        }
    except KeyError as missing:
        raise FormatError(f"the config lacks {missing}, which GGUF needs") from None


def rotary(config: dict[str, Any], name: str = "llama", ropes: tuple[str, ...] = ROPES) -> dict[str, int | float | str]:
    """The rotary keys, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    given = config.get("rope_parameters") or {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta", 10000.0)}
    kind = given.get("rope_type", given.get("type", "default"))
    out: dict[str, int | float | str] = {f"{name}.rope.freq_base": float(given.get("rope_theta", 10000.0))}
    if kind not in ropes:
        raise FormatError(f"the GGUF writer cannot express rotary scaling {kind!r} of {name}; it knows {', '.join(ropes)}")
    if kind == "linear":
        out |= {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": float(given["factor"])}
    return out


def rotary_factors(config: dict[str, Any]) -> Tensor | None:
    """What llama3's scaling divides the frequency of each pair by, (D/2,): 1 for short waves, `factor` for long ones, between the two smoothly.
    None for other scalings. Source: transformers, modeling_rope_utils; convert_hf_to_gguf.py."""
    given = config.get("rope_parameters") or {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta", 10000.0)}
    if given.get("rope_type", given.get("type")) != "llama3":
        return None
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    frequency = 1.0 / given["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    low, high, turns = given["low_freq_factor"], given["high_freq_factor"], given["original_max_position_embeddings"] * frequency / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)           # 0 for long waves, 1 for short
    return (1 / ((1 - smooth) / given["factor"] + smooth)).float()
