"""Architectures: which Hugging Face models llama.cpp has a computation for, and what each wants to be told. One row each; llama.py is the first.

    general.architecture   config's model_type       otherwise than Llama
    llama                  llama, mistral            rows of q and k permuted (llama.py); Mistral only without a sliding window
    qwen2                  qwen2                     biases of q, k and v; rows stay, here and below
    qwen3                  qwen3                     norms of q and k
    gemma                  gemma                     norms hold 1 + w; tied head; gelu
    gemma2                 gemma2                    and norms behind each part; sliding window in every other layer; logits capped
    gemma3                 gemma3_text               and norms of q and k; five layers with a window to one without; a second rotary base
    bert                   bert                      bert.py

Names are those of the gguf package (`gguf.TensorNameMap`); only which modules there are stands here. What llama.cpp derives by itself, where a config
could say otherwise, is checked: the windows' pattern, the caps, the factor of q (1 / sqrt(head size), but for the 27B sizes, where it takes width /
heads). A value that llama.cpp would not follow is refused by name, since the file would load and compute something else.

Gemma multiplies by 1 + w after its norms, and GGUF stores that number. So `read` gives (1 + w) - 1, from which 1 + w comes back exactly, which is all
that the model computes with, but not every last bit of w: `kept` says what becomes of a tensor.

Source: src/models/*.cpp, src/llama-arch.cpp and conversion/*.py of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor

from ...core.error import FormatError
from . import bert, llama

FEED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
AROUND = (*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
PAIR = ("self_attn.q_norm", "self_attn.k_norm")
DECODER = ("model.embed_tokens", "model.norm", "lm_head")
PERIOD = {"gemma2": 2, "gemma3": 6}                               # every so many layers one has no window
LARGE = {"gemma2": 46, "gemma3": 62}                              # layers of the 27B sizes
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One row. kinds: model_type in config.json. parts, ends: the modules of a layer and those outside. layers: what stands before a layer's number.
    biased: modules that must have a bias; free: whether the others may. turned: whether rows of q and k are permuted. shift: what is added to norms.
    prefix: what a model class with a head puts before the names. optional: ends that a model may lack. numbers: config, GGUF names -> keys."""

    name: str
    kinds: tuple[str, ...]
    parts: tuple[str, ...]
    numbers: Callable[[dict[str, Any], set[str]], Numbers] = field(compare=False)
    ends: tuple[str, ...] = DECODER
    layers: str = "model.layers"
    biased: tuple[str, ...] = ()
    free: bool = False
    turned: bool = False
    shift: float = 0.0
    prefix: str = ""
    optional: tuple[str, ...] = ()

    def to_gguf(self, hf: str) -> str | None:
        """A Hugging Face parameter name -> GGUF's, or None for one that the architecture does not have."""
        parts, ends = self._names()
        return llama.to_gguf(hf.removeprefix(self.prefix), parts, ends, self.layers)

    def to_hf(self, name: str, names: set[str]) -> str | None:
        """The inverse; names: all GGUF names of the file, which tell a model with a head from one without."""
        parts, ends = self._names()
        hf = llama.to_hf(name, parts, ends, self.layers)
        headed = self.prefix and hf is not None and f"{bert.HEAD}.weight" in names and not name.startswith(bert.HEAD)
        return f"{self.prefix}{hf}" if headed else hf

    def expected(self, config: dict[str, Any], names: set[str]) -> tuple[set[str], set[str]]:
        """The GGUF names that a model of this config must have and does not, and those that it has beyond them."""
        parts, ends = self._names()
        tied = config.get("tie_word_embeddings", False)
        left = {ends[end] for end in self.optional if f"{ends[end]}.weight" not in names} | ({"output"} if tied else set())
        layers = [f"blk.{i}.{part}" for i in range(config["num_hidden_layers"]) for part in parts.values()]
        all_of = [*layers, *(end for end in ends.values() if end not in left)]
        bias = {parts[part] for part in self.biased if part in parts} | {ends[end] for end in self.biased if end in ends}
        must = {f"{name}.weight" for name in all_of} | {f"{name}.bias" for name in all_of if llama.part_of(name) in bias}
        may = {f"{name}.bias" for name in layers if self.free and not name.endswith("norm")}
        if bert.HEAD in all_of and bert.POOLER not in all_of:
            must |= {f"{bert.POOLER}.weight", f"{bert.POOLER}.bias"}
        return must - names, names - must - may

    def heads_of(self, name: str, heads: int, kv_heads: int) -> int | None:
        """How many heads share the rows of a tensor that is permuted; None for one that is not."""
        return llama.heads_of(name, heads, kv_heads) if self.turned else None

    def stored(self, hf: str, tensor: Tensor) -> Tensor:
        """A plain tensor as GGUF holds it."""
        return tensor.float() + self.shift if self.shift and hf.endswith("norm.weight") else tensor

    def kept(self, hf: str, tensor: Tensor) -> Tensor:
        """A plain tensor as a reader has it back."""
        return self.unshifted(hf, self.stored(hf, tensor))

    def unshifted(self, hf: str, values: Tensor) -> Tensor:
        """The inverse of `stored`, up to its rounding."""
        return values - self.shift if self.shift and hf.endswith("norm.weight") else values

    def _names(self) -> tuple[dict[str, str], dict[str, str]]:
        return (llama.PARTS, llama.ENDS) if self.turned else _mapped(self.name, self.parts, self.ends, self.layers)


@lru_cache
def _mapped(name: str, parts: tuple[str, ...], ends: tuple[str, ...], layers: str) -> tuple[dict[str, str], dict[str, str]]:
    """Modules -> GGUF names, by the gguf package."""
    import gguf

    kind = next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(kind, 1)
    outside = {end: bert.OWN.get(end) or str(names.get_name(end)) for end in ends}
    return {part: str(names.get_name(f"{layers}.0.{part}")).removeprefix("blk.0.") for part in parts}, outside


def _wants(name: str, config: dict[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    """Refuse a value that llama.cpp would not follow."""
    if config.get(key, allowed[0]) not in allowed:
        raise FormatError(f"GGUF's {name} has {key}={' or '.join(map(repr, allowed))}, the config says {config[key]!r}")


def _llama(config: dict[str, Any], names: set[str]) -> Numbers:
    window = config.get("sliding_window")
    if config["model_type"] == "mistral" and window is not None and window < config.get("max_position_embeddings", 0):
        raise FormatError(f"GGUF's llama has no sliding window, the config says sliding_window={window!r}; up to that length both are the same: "
                          f"set max_position_embeddings={window}, or sliding_window=None if the model was trained without")
    return llama.numbers(config)


def _qwen(config: dict[str, Any], names: set[str]) -> Numbers:
    name = config["model_type"]
    for key, value in (("use_sliding_window", False), ("attention_bias", False)):
        _wants(name, config, key, (value, None))
    return llama.numbers(config, name, ("default", "linear"))


def _gemma(config: dict[str, Any], names: set[str]) -> Numbers:
    name = {"gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])
    for key in ("attention_bias", "use_bidirectional_attention"):
        _wants(name, config, key, (False, None))
    act = "hidden_activation" if config.get("hidden_activation") else "hidden_act"
    _wants(name, config, act, ("gelu_pytorch_tanh", "gelu_new", "gelu"))
    if name != "gemma3" and not config.get("tie_word_embeddings", True):
        raise FormatError(f"GGUF's {name} takes the embeddings as the head; the config says tie_word_embeddings=False")
    ropes = config.get("rope_parameters") or {}
    full = {**config, "rope_parameters": ropes["full_attention"]} if "full_attention" in ropes else config
    keys = llama.numbers({**full, act: "silu", "hidden_act": "silu"}, name, ("default", "linear") if name == "gemma3" else ("default",))
    return keys if name == "gemma" else {**keys, **_windows(name, config, ropes)}


def _windows(name: str, config: dict[str, Any], ropes: dict[str, Any]) -> Numbers:
    """Sliding windows, caps and the factor of q, of Gemma 2 and 3."""
    layers, period = config["num_hidden_layers"], PERIOD[name]
    wanted = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
    if list(config.get("layer_types") or wanted) != wanted:
        raise FormatError(f"GGUF's {name} has a layer without a window after every {period - 1} with one; layer_types says {config['layer_types']}")
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    factor = config["hidden_size"] // config["num_attention_heads"] if layers == LARGE[name] else size
    _wants(name, config, "query_pre_attn_scalar", (factor, float(factor)))
    keys = {f"{name}.attention.sliding_window": config["sliding_window"]}
    if name == "gemma2":
        for key, at in (("attn_logit_softcapping", "attn_logit_softcapping"), ("final_logit_softcapping", "final_logit_softcapping")):
            if not config.get(key):
                raise FormatError(f"GGUF's gemma2 always caps its logits, the config says {key}={config.get(key)!r}")
            keys[f"{name}.{at}"] = float(config[key])
        return keys
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        _wants(name, config, key, (None,))
    near = ropes.get("sliding_attention") or {"rope_type": "default", "rope_theta": config.get("rope_local_base_freq", 10000.0)}
    if near.get("rope_type", "default") != "default":
        raise FormatError(f"GGUF's gemma3 scales no rotary angles in layers with a window, the config says {near['rope_type']!r}")
    return {**keys, "gemma3.rope.freq_base_swa": float(near["rope_theta"])}


ROWS = (
    Architecture(*llama.ARCHITECTURES, ("llama", "mistral"), tuple(llama.PARTS), _llama, tuple(llama.ENDS), free=True, turned=True),
    Architecture("qwen2", ("qwen2",), (*NORMS, *ATTENTION, *FEED), _qwen, biased=ATTENTION[:3]),
    Architecture("qwen3", ("qwen3",), (*NORMS, *ATTENTION, *PAIR, *FEED), _qwen),
    Architecture("gemma", ("gemma",), (*NORMS, *ATTENTION, *FEED), _gemma, DECODER[:2], shift=1.0),
    Architecture("gemma2", ("gemma2",), (*AROUND, *ATTENTION, *FEED), _gemma, DECODER[:2], shift=1.0),
    Architecture("gemma3", ("gemma3_text",), (*AROUND, *ATTENTION, *PAIR, *FEED), _gemma, shift=1.0),
    Architecture("bert", ("bert",), bert.PARTS, bert.numbers, bert.ENDS, "encoder.layer", biased=bert.BIASED, prefix="bert.",
                 optional=("pooler.dense", "classifier")),
)
KINDS = {kind: row for row in ROWS for kind in row.kinds}
NAMES = {row.name: row for row in ROWS}


def of(config: dict[str, Any]) -> Architecture:
    """The row of a config.

    Raises:
        FormatError: an architecture that none has; names those that there are.

    >>> of({"model_type": "mistral"}).name
    'llama'
    """
    kind = config.get("model_type")
    if kind not in KINDS:
        raise FormatError(f"the GGUF writer knows no architecture {kind!r}; it knows {', '.join(KINDS)}")
    return KINDS[kind]
