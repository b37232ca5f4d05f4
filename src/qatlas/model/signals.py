"""Signals: what flows through a model, by name. An address is "glob:signal", with the globs and roles of rules.

    input, output               of any module: the first tensor that goes in, the first that comes out
    query, key, value,          inside attention (layers/attention.py), of each module that calls transformers' AttentionInterface
    scores, probabilities, context
    query_input, key_input,     what goes into the projections of query, key and value, each by itself
    value_input
    projected                   what leaves the output projection, before dropout, residual and norm (the attention output of Teacher Intervention):
                                one name for `o_proj`, `c_proj`, and BERT's `output.dense`, which stands beside its attention module
    attended                    what the feed-forward part reads: the attention output after residual and norm, whether the norm closes the attention
                                (BERT) or opens the feed-forward part (Llama, ViT). Blocks that compute both parts side by side (Phi) have none

So "*:scores" or "@attention:value_input" says the same of any model, and "model.layers.3.self_attn:probabilities" of one module. An address reaches
the matched modules that have the signal. One that matches no module, and one whose modules all lack the signal, is an error that says what there is.

Refused by name: models whose attention does not go through AttentionInterface (DeBERTa-v2, MPNet, BLOOM, Falcon, torch's own), for signals inside;
and query_input, key_input, value_input where one matrix makes all three (GPT-2's c_attn, Phi-3's qkv_proj): they are one tensor there.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from ..core.error import RuleError, nearest
from ..layers import attention
from .roles import roles

PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"), ("wq", "wk", "wv"),
               ("q_attn", "k_attn", "v_attn"), ("query_proj", "key_proj", "value_proj"))
FUSED = ("c_attn", "qkv_proj", "qkv", "Wqkv", "query_key_value", "in_proj", "qkv_lin", "att_proj")
OUT = ("o_proj", "out_proj", "c_proj", "out_lin", "dense", "o", "Wo", "wo", "proj", "projection", "output_proj")
FORWARD = ("mlp", "intermediate", "ffn", "feed_forward", "feedforward", "fc1", "lin1", "block_sparse_moe")
PARTS = ("query_input", "key_input", "value_input")
ALL = ("input", "output", *attention.INSIDE, *PARTS, "projected", "attended")
HELD = "qatlas_attention"                                         # on the model: who holds it switched, and what to go back to
SHOWN = 5


class Spot(NamedTuple):
    """One signal: its full address, and where it is tapped: a module and input, output or a signal inside attention."""

    address: str
    at: str
    module: nn.Module
    signal: str


@dataclass(frozen=True)
class Attention:
    """The names around one attention module: of its projections (query, key, value), of one matrix that makes all three, of the output projection,
    of the feed-forward part that reads what comes out. None where there is none."""

    name: str
    parts: tuple[str, str, str] | None
    fused: str | None
    out: str | None
    forward: str | None


def attentions(model: nn.Module) -> dict[str, Attention]:
    """Name -> Attention, for every module that goes through AttentionInterface.

    >>> from transformers import GPT2Config, GPT2Model
    >>> attentions(GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=8)))["h.0.attn"].fused
    'h.0.attn.c_attn'
    """
    names = dict(model.named_modules())
    found = {}
    for name, module in names.items():
        if not attention.attends(module):
            continue
        within = f"{name}." if name else ""
        parts = next((p for p in PROJECTIONS if all(within + part in names for part in p)), None)
        fused = next((within + one for one in FUSED if within + one in names), None) if parts is None else None
        beside = f"{name.rpartition('.')[0]}.output.dense".lstrip(".")
        out = next((within + one for one in OUT if within + one in names), beside if name.endswith(".self") and beside in names else None)
        named = None if parts is None else tuple(within + part for part in parts)
        found[name] = Attention(name, named, fused, out, _forward(name, names))  # type: ignore[arg-type]
    return found


def _forward(name: str, names: Mapping[str, nn.Module]) -> str | None:
    """The feed-forward part behind an attention module: in the nearest module around both. None where the two stand side by side."""
    while name:
        name = name.rpartition(".")[0]
        around = f"{name}." if name else ""
        found = next((around + one for one in FORWARD if around + one in names), None)
        if found is not None:
            parts = [f"{at.rpartition('.')[2]} {type(module).__name__}".lower() for at, module in names.items() if at.startswith(around)]
            norms = sum("norm" in part for part in parts)
            config: Any = getattr(names[""], "config", None)
            return None if norms < 2 or getattr(config, "use_parallel_residual", False) or getattr(config, "parallel_attn", False) else found
    return None


def matches(glob: str, name: str, role: Iterable[str] = ()) -> bool:
    """Whether a glob, or a role such as "@head", means a module of this name and these roles."""
    return glob in role if glob.startswith("@") else fnmatch.fnmatchcase(name, glob)


class Survey(NamedTuple):
    """What there is to find in a model; made once for many addresses."""

    names: dict[str, nn.Module]
    around: dict[str, Attention]

    @classmethod
    def of(cls, model: nn.Module) -> Survey:
        """Look at the model."""
        return cls(dict(model.named_modules()), attentions(model))


def find(model: nn.Module, address: str, survey: Survey | None = None) -> list[Spot]:
    """The signals that an address reaches, in the order of the model's modules.

    Raises:
        RuleError: no address, an unknown signal, nothing that matches, or nothing matched that has the signal.
    """
    glob, _, signal = address.partition(":")
    if not signal:
        raise RuleError(f"{address!r} names a module, not a signal; write {address + ':output'!r}, or one of {', '.join(ALL)}")
    if signal not in ALL:
        close = nearest(signal, ALL) or ["none is close"]
        raise RuleError(f"{address!r}: there is no signal {signal}, nearest: {', '.join(close)}; all: {', '.join(ALL)}")
    names, around = survey or Survey.of(model)
    role = roles(model) if glob.startswith("@") else {}
    matched = [glob] if glob in names else [name for name in names if matches(glob, name, role.get(name, ()))]
    if not matched and glob == "@attention":                      # all that has this role goes through AttentionInterface
        raise RuleError(_lacking(model, address, matched, names, around))
    if not matched:
        close = nearest(glob, [n for n in names if n], SHOWN) or sorted({n.split(".")[-1] for n in names if n})[:SHOWN]
        raise RuleError(f"{address!r} matches no module.\n  nearest names: {', '.join(close)}\n  modules with attention: "
                        f"{', '.join(list(around)[:SHOWN]) or 'none'}")
    spots = [spot for name in matched if (spot := _spot(name, signal, names, around)) is not None]
    if not spots:
        raise RuleError(_lacking(model, address, matched, names, around))
    return spots


def _spot(name: str, signal: str, names: Mapping[str, nn.Module], around: Mapping[str, Attention]) -> Spot | None:
    if signal in ("input", "output"):
        return Spot(f"{name}:{signal}", name, names[name], signal)
    near = around.get(name)
    if near is None:
        return None
    at: str | None
    if signal in attention.INSIDE:
        at, local = name, signal
    elif signal == "projected":
        at, local = near.out, "output"
    elif signal == "attended":
        at, local = near.forward, "input"
    else:
        at, local = None if near.parts is None else near.parts[PARTS.index(signal)], "input"
    return None if at is None else Spot(f"{name}:{signal}", at, names[at], local)


def has(name: str, around: Mapping[str, Attention]) -> list[str]:
    """The signals of a module."""
    near = around.get(name)
    return ["input", "output"] + ([] if near is None else [*attention.INSIDE, *(PARTS if near.parts else ()), *(["projected"] if near.out else []),
                                                        *(["attended"] if near.forward else [])])


def _lacking(model: nn.Module, address: str, matched: list[str], names: Mapping[str, nn.Module], around: Mapping[str, Attention]) -> str:
    signal, first = address.partition(":")[2], next(iter(matched), "")
    fused = next(((name, one) for name in matched if name in around and (one := around[name].fused)), None)
    if signal in PARTS and fused is not None:
        return (f"{address!r}: {type(names[fused[0]]).__name__} makes query, key and value with one matrix, {fused[1]}: their inputs are one "
                f"tensor and cannot be told apart. {fused[1] + ':input'!r} is the input of all three")
    if not around:
        own = sorted({type(m).__name__ for m in names.values() if "attention" in type(m).__name__.lower()})
        return (f"{address!r}: the attention of {type(model).__name__} ({', '.join(own[:3]) or 'it has none'}) does not go through transformers' "
                "AttentionInterface, so nothing inside it can be read, overridden or quantized; inputs and outputs of its modules can")
    return (f"{address!r}: {first} ({type(names[first]).__name__}) has no signal {signal}; it has {', '.join(has(first, around))}. "
            f"Modules with attention: {', '.join(list(around)[:SHOWN])}")


def hold(model: nn.Module) -> Callable[[], None]:
    """Switch the model to our attention until what is returned has been called, once for each `hold`.

    Raises:
        RuleError: a model that cannot be switched.
    """
    attention.register()
    held = model.__dict__.setdefault(HELD, {"count": 0, "before": []})

    def release() -> None:
        held["count"] -= 1
        if held["count"] <= 0:
            for config, before in held["before"]:                  # the outermost first: setting it sets those below
                config._attn_implementation = before
            model.__dict__.pop(HELD, None)

    held["count"] += 1
    if held["count"] == 1:
        held["before"] = [(config, config._attn_implementation) for config in _configs(model)]
        try:
            _switch(model)
        except Exception:
            release()
            raise
    return release


def _configs(model: nn.Module) -> list[Any]:
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None and hasattr(c, "_attn_implementation")}
    return list(found.values())


def _switch(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    done: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(name.startswith(f"{top}.") or not top for top in done):
            done.append(name)
            module.set_attn_implementation(attention.NAME)
    for name in attentions(model):
        inner: Any = model.get_submodule(name)
        if inner.config._attn_implementation != attention.NAME:
            raise RuleError(f"{name} cannot be switched to our attention: it stands outside of a transformers model, or its model forbids it")


def keep(model: nn.Module) -> None:
    """Switch the model to our attention for good, with a configuration of its own: another model made from the same one stays as it is."""
    copies: dict[int, Any] = {}                                   # one memo: a configuration that many modules share is copied once
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config = copy.deepcopy(module.config, copies)
    hold(model)
