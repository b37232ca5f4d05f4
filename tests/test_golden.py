"""Our parts held against the authors' numbers.

The vectors were made by the authors' own code (tests/golden/README.md; all of them lie in the folder that QATLAS_GOLDEN names). A *map* says which
public parts of ours mean the same as a case, from its kind and parameters alone; it builds them, calls them, runs backward and hands back named
tensors. It computes nothing itself, so what is compared is what a user gets. Every output of a case must be answered, or its name stands in `lacks`.

Each case ends in one of three ways (some only hold the inputs of others), printed at the end of the run:

    passed      every output agrees: float64 to 1e-12, float32 to 2e-6, sums to 1e-5
    refused     we do not reproduce it, in whole or at some places; REFUSED holds the reason. What is not refused of it is still compared
    uncovered   no public part says it yet: the map answers None, or there is no map. It comes with its paper
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from qatlas.core.estimator import Clip, Ste, Trust
from qatlas.core.grain import Grain, Group, PerChannel, PerTensor, PerToken
from qatlas.core.grid import Float, HalfStep, Sign, Stretched, Ternary, Uniform
from qatlas.core.qtensor import QTensor, pack_bits, unpack_bits
from qatlas.core.quantizer import Quant, Quantizer
from qatlas.core.scale import AbsMax, AbsMean, Learned, MinMax, Percentile, Rms
from qatlas.core.transform import hadamard
from qatlas.export.gguf.layout import LAYOUTS
from qatlas.model import taps
from qatlas.papers.bitnet import of_input as bitnet_input
from qatlas.papers.bitnet import of_weight as bitnet_weight
from qatlas.papers.paretoq import of_weight
from qatlas.papers.teacher_intervention import Intervened
from qatlas.papers.ternarybert import activations, ternarize
from qatlas.train.imitate import Imitation, find
from qatlas.train.labelled import Classification
from qatlas.train.run import Run
from qatlas.train.teacher import Teacher

FOLDER = Path(os.environ.get("QATLAS_GOLDEN") or Path(__file__).parent / "golden")
P = dict[str, Any]
A = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One case of one file: its parameters P, its arrays A, and the arrays of every other case of the file."""

    file: str
    name: str
    p: P
    a: A
    rest: dict[str, A]
    rest_p: dict[str, P] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return str(self.p["kind"])


def read(path: Path) -> Iterator[Case]:
    with numpy.load(path) as z:
        names = json.loads(bytes(z["params_json"]))
        arrays: dict[str, A] = {name: {} for name in names}
        for key in z.files:
            case, _, array = key.partition("/")
            if case in arrays:
                arrays[case][array] = torch.from_numpy(z[key])
    for name, p in names.items():
        yield Case(path.stem, name, p, arrays[name], arrays, names)


CASES = [case for path in sorted(FOLDER.glob("*.npz")) for case in read(path)]


# ---- what is refused -------------------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Refused:
    """when: for which cases. where: the places that are not compared, a bool tensor of the input's shape (a scale's gradient is then left out where
    its group holds one), or a dict of them by output, or True for all. within: a wider tolerance instead of places."""

    file: str
    when: Callable[[P, A], Any]
    reason: str
    where: Callable[[P, A], Tensor | dict[str, Tensor] | bool] = lambda p, a: True
    within: float | None = None


def nan(p: P, a: A) -> Tensor:
    return torch.isnan(a["y"])


def zeros(p: P, a: A) -> Tensor:
    return (a["w"] if "w" in a else a["x"]) == 0


def binary(p: P, a: A) -> bool:
    return p.get("w_bits", p.get("num_bits")) == 1 and "unsigned" not in p["kind"] and p.get("fn") != "ElasticQuantBinarizerUnsigned"


def has(name: str, part: str) -> Callable[[P, A], bool]:
    return lambda p, a: part in str(p.get(name))


def double(p: P, a: A) -> bool:
    return any(a[name].dtype == torch.float64 for name in ("w", "x", "y") if name in a)


def ties(x: str, scale: str | None = None, parts: Callable[[P], int] | None = None) -> Callable[[P, A], Tensor]:
    """Where x / scale, or x * parts, is exactly half a step from a level."""
    def where(p: P, a: A) -> Tensor:
        steps = a[x] * parts(p) if parts else (a[x].reshape(a[scale].numel(), -1) / a[scale].reshape(-1, 1)).reshape(a[x].shape)
        return (steps - steps.floor()) == 0.5
    return where


def level(p: P, a: A) -> Tensor:
    """Rows of one value: on a grid without zero, or rotated onto one channel, all of their entries are ties."""
    return (a["x"].amax(-1, keepdim=True) == a["x"].amin(-1, keepdim=True)).expand_as(a["x"])


def fraction(zero: str) -> Callable[[P, A], bool]:
    return lambda p, a: zero in a and bool((a[zero] != a[zero].round()).any())


def beyond(*bounds: str) -> Callable[[P, A], dict[str, Tensor]]:
    """Gradients where the array leaves the bound that only masks them."""
    def where(p: P, a: A) -> dict[str, Tensor]:
        bound = a["clip_val"].amax() if "clip_val" in a else 2.0
        return {f"grad_{name}": a[name].abs() >= bound for name in bounds if name in a}
    return where


def quant_case(p: P, a: A) -> bool:
    return str(p["kind"]).startswith(("quant", "LSQPlus", "uaq", "uniform")) and ("grad_out" in a)


SIGN = "sign(0) = 0: one bit has no third value and no binary format can store it; ours is +1"
ZERO = "an all-zero group gives 0/0 = NaN; ours gives zeros"
EPSILON = "an epsilon (1e-8 .. 1e-6) is added to the range and moves every value; we keep a floor under the step instead. Compared to 1e-4"
FRACTION = "the zero point is used as a fraction: no integer artefact holds it (a learned offset in values, as LSQ+, is our way)"
ORDER = "x / s is rounded before the zero is added: an exact tie goes the other way where the zero is odd"
TIE = "multiplies by the number of steps where we divide by the step: a tie of theirs is none of ours"
UP = "rounds x / s + 1/2, we x / s - 1/2: an exact tie goes the other way; zero becomes the lower of the two middle levels"
TABLE = "Hadamard matrices of order K from a table; ours are made by Paley's constructions: another matrix, as orthogonal"
ROOT = "1/sqrt(n) is taken in float32 also for float64 input"
BF16 = "the rotation is a bfloat16 matrix with H H^T = 0.99979 I; ours is orthonormal. Compared to 1e-3"
ROWS = "groups run across the ends of rows; a group of ours lies in one row"
MASK = "the gradient is masked by a bound on x that the forward does not know"
HALF = "a row of one sign gets half of its range as grid (scale from 0..max, zero in the middle), its values are cut in two"
EMPTY = "the zero point of an all-zero group is 0; ours is the lowest code, as the rule for any other group says. The values are the same"
NEGATIVE = "negative zero is written with a code of its own; a value of ours has one code"
MASTER = "float64 run of code whose scale is a float32 here: masters are float32. Compared to 1e-6"
TWO_THIRDS = "outside of the ternary stretched grid the clip value hears 1, but the value there moves by 2/3 of it"
NOISE = "their gradient factor y.detach() - (y g).detach() + y g leaves float noise in the step. Compared to 1e-4"

HEADS = "one scale for each head of each sample, which no part of a stored model can have; the released scripts never take it"
HIDDEN = "what the mask hides gets -10000, in transformers the lowest number; the map is 0 there in both"

REFUSED = [
    Refused("paretoq", binary, SIGN, zeros),
    Refused("stableqat", binary, SIGN, zeros),
    Refused("bit", binary, SIGN, zeros),
    Refused("lsq_family", has("kind", "reste"), SIGN, zeros),
    Refused("llmqat", lambda p, a: p["kind"] == "linear" and p["w_bits"] == 1 and bool(zeros(p, a).any()), SIGN),
    Refused("lsq_family", lambda p, a: p["kind"] == "statsq" and bool(nan(p, a).any()), ZERO, nan),
    Refused("ternarybert", lambda p, a: bool(nan(p, a).any()), ZERO, nan),
    Refused("ternarybert", lambda p, a: a["x"].dim() > 3 and not p["layerwise"], HEADS),
    Refused("ternarybert", lambda p, a: p["cls"] == "AsymQuantizer" and p["layerwise"], TIE,
            lambda p, a: (zeros(p, a) & (a["x"].amax() >= p["clip"]) & (a["x"].amin() <= -p["clip"]))),
    Refused("ternarybert", lambda p, a: double(p, a) and a["y"].dtype == torch.float32, "writes into a float32 tensor also for float64 input",
            within=1e-7),
    Refused("teacher_intervention", lambda p, a: "scores" in a, HIDDEN, lambda p, a: {"scores": a["scores"] <= -100}),
    Refused("lsq_family", has("kind", "_aff"), ORDER, ties("w", "scale")),
    Refused("efficientqat", lambda p, a: "scale" in a, ORDER, ties("w", "scale")),
    Refused("paretoq", lambda p, a: p["w_bits"] == 0 and p.get("fn") != "lsq", TWO_THIRDS,
            lambda p, a: {"grad_alpha": torch.ones_like(a["grad_alpha"], dtype=torch.bool)}),
    Refused("efficientdm", lambda p, a: double(p, a) and p["kind"].endswith("init"), MASTER, within=1e-6),
    Refused("efficientqat", lambda p, a: "w" in a and a["w"].shape[1] % p["group_size"] != 0, ROWS),
    Refused("lsq_family", has("kind", "ewgs"), TIE, ties("x", parts=lambda p: p["num_levels"] - 1)),
    Refused("pdqat", lambda p, a: p["kind"] == "act", TIE, ties("x", parts=lambda p: 2 ** p["bits"] - 1)),
    Refused("aecct", lambda p, a: True, EPSILON, within=1e-4),
    Refused("llmqat", lambda p, a: True, EPSILON, within=1e-4),
    Refused("ternarybert", lambda p, a: double(p, a) and p["cls"] == "AsymQuantizer", EPSILON, within=1e-4),
    Refused("llmqat", lambda p, a: True, MASK, beyond("w", "x")),
    Refused("hadamard", lambda p, a: p["K"] > 1, TABLE),
    Refused("hadamard", double, ROOT, within=1e-6),
    Refused("quest", has("cls", "Hadamard"), BF16, within=1e-3),
    Refused("quest", lambda p, a: p.get("bits") == 1.585, "2^1.585 = 3.00008 levels; three levels are Ternary() or Stretched(3)"),
    Refused("quest", lambda p, a: p.get("centered") is False and p["cls"] != "STEQuantizer", "its negative clip lacks a division by n: far too wide"),
    Refused("quest", has("cls", "PACT"), "its gradient mask is inverted: only what was clipped trains, and clipping stops that"),
    Refused("bitnet", has("kind", "auto_offline_bias"), "the bias is multiplied with the weight's scale"),
    Refused("bitnet", has("kind", "gpu_bitlinear_bf"), "no straight-through: the input hears the scale of its token only", lambda p, a: {
        "grad_x": torch.ones_like(a["grad_x"], dtype=torch.bool)}),
    Refused("quest", has("cls", "TrustQuantizer"), UP, level),
    Refused("quest", has("cls", "STEQuantizer"), UP, level),
    Refused("quest", has("cls", "ClipQuantizer"), UP, level),
    Refused("pbllm", lambda p, a: bool(p.get("sym")), HALF, lambda p, a: ((a["w"].amin(1) >= 0) | (a["w"].amax(1) <= 0))[:, None].expand_as(a["w"])),
    Refused("compressed_tensors", lambda p, a: p.get("symmetric") is False, EMPTY, zeros),
    Refused("compressed_tensors", has("kind", "fp4"), NEGATIVE, lambda p, a: {
        "fp4_bytes": ((a["fp4"] == 0) & torch.signbit(a["fp4"])).unflatten(-1, (-1, 2)).any(-1)}),
    Refused("bit", double, MASTER, within=1e-6),
    Refused("bitnet", double, MASTER, within=1e-6),
    Refused("edgeqat", lambda p, a: p["kind"].startswith("act"), NOISE, within=1e-4),
    Refused("edgeqat", lambda p, a: "zp" in a and bool(a["zp"].round().abs().amax() > 2 ** (p["nbits_a"] - 1) - 1) and bool(a["signed"].all()),
            "the zero point lies outside of the grid; ours is kept on it, where every format wants it"),
    Refused("qvgen", lambda p, a: p["kind"].startswith("LSQPlus"), FRACTION),
    Refused("efficientdm", lambda p, a: quant_case(p, a) and fraction("zero")(p, a), FRACTION),
    Refused("fimaq", lambda p, a: quant_case(p, a) and fraction("zero")(p, a), FRACTION),
    Refused("lrqat", lambda p, a: p["kind"] == "dyn" or (quant_case(p, a) and fraction("zero")(p, a)), FRACTION),
]


# ---- the means of a map: build, call, backward -----------------------------------------------------------------------------------------------------

Answer = dict[str, Tensor] | None
MAPS: dict[str, Callable[[Case], Answer]] = {}
LACKS: dict[str, set[str]] = {}


def maps(file: str, *lacks: str) -> Callable[[Callable[[Case], Answer]], Callable[[Case], Answer]]:
    """Register the map of a file. lacks: outputs that are an author's own form of what is compared elsewhere."""
    def hold(one: Callable[[Case], Answer]) -> Callable[[Case], Answer]:
        MAPS[file], LACKS[file] = one, set(lacks)
        return one
    return hold


def holding(quant: Quant, shape: torch.Size, **state: Tensor) -> Quantizer:
    """A Quantizer with a given scale, and zero or offset, loaded as from a checkpoint."""
    quantizer = Quantizer(quant)
    own = quant.grain.scale_shape(shape)
    state = {name: t.reshape(own) if t.numel() == math.prod(own) else t.reshape(-1)[:1].expand(own) for name, t in state.items()}
    quantizer.load_state_dict(state)                              # masters are fp32
    if any(t.dtype == torch.float64 for t in state.values()):
        quantizer.double().load_state_dict(state)
    return quantizer


def put(a: A, source: str, *grads: Tensor | None, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradients under the names that the case uses; a gradient that it does not record is left out."""
    out = {}
    for grad, name in zip(grads, names, strict=True):
        key = f"grad_{name}" if f"grad_{name}" in a else {"w": "grad_x", "x": "grad_w"}.get(name, "")
        if key in a and grad is not None:
            out[key] = grad
    return out


def fake(c: Case, quant: Quant, x: str = "w", dtype: torch.dtype | None = None, y: str = "y", **state: str) -> dict[str, Tensor]:
    """Forward and backward of one quantizer on the array x; state names the arrays of scale, zero, offset."""
    source = c.a[x].clone().to(dtype or c.a[x].dtype).requires_grad_()
    quantizer = holding(quant, source.shape, **{name: c.a[array].to(source.dtype) for name, array in state.items()})
    out = quantizer(source)
    answer = {y: out.detach()}
    if "grad_out" in c.a:
        out.backward(c.a["grad_out"].to(out.dtype))
        held = [getattr(quantizer, name).grad for name in state]
        answer |= put(c.a, x, source.grad, *held, names=(x, *state.values()))
    if "codes" in c.a and quant.bits > 1:                         # their one-bit codes are signs
        answer["codes"] = quantizer.quantize(source.detach()).codes
    return answer


def layer(c: Case, weight: Quant | None, inputs: Quant | None, **state: str) -> dict[str, Tensor]:
    """A linear layer with quantized weight and input."""
    w, x = c.a["w"].clone().requires_grad_(), c.a["x"].clone().requires_grad_()
    bias = c.a["bias"].clone().requires_grad_() if "bias" in c.a else None
    quantizer = None if weight is None else holding(weight, w.shape, **{name: c.a[array] for name, array in state.items()})
    y = F.linear(x if inputs is None else Quantizer(inputs)(x), w if quantizer is None else quantizer(w), bias)
    y.backward(c.a["grad_out"])
    held = [getattr(quantizer, name).grad for name in state]
    return {"y": y.detach()} | put(c.a, "w", w.grad, x.grad, None if bias is None else bias.grad, *held, names=("w", "x", "bias", *state.values()))


def grain_of(c: Case, scale: str) -> Grain:
    return PerTensor() if c.a[scale].numel() == 1 else PerChannel()


# ---- the maps --------------------------------------------------------------------------------------------------------------------------------------

@maps("lsq_family")
def lsq_family(c: Case) -> Answer:
    p, a = c.p, c.a
    if c.kind.startswith("mqlsq"):
        grid = Uniform(p["bits"], signed=p["quant_min"] < 0)
        quant = Quant(grid, PerChannel() if p["per_channel"] else PerTensor(), Learned(margin=0.5), Clip(0.5))
        return fake(c, quant, scale="scale", zero="zero")
    if c.kind.startswith("ofqlsq"):
        return fake(c, Quant(Uniform(p["bit"]), scale=Learned(), estimator=Clip()), scale="scale")
    if c.kind == "statsq":
        return fake(c, Quant(HalfStep(p["num_bits"]), scale=AbsMean(2.0 / 2 ** (p["num_bits"] - 1))))
    if c.kind == "ewgs" and p["delta"] == 0:
        top = p["num_levels"] - 1
        quant = Quant(Uniform(top.bit_length(), False), PerTensor(), Learned(), Ste())
        return fake(Case(c.file, c.name, p, a | {"step": torch.tensor(1 / top)}, c.rest), quant, "x", scale="step")
    if c.kind == "reste" and p["o"] == 1:
        quant = Quant(Sign(), PerTensor(), Learned(), Clip(at=p["t"]))
        return fake(Case(c.file, c.name, p, a | {"step": torch.tensor(1.0)}, c.rest), quant, "x", scale="step")
    return None


def paretoq_quant(bits: int, stretched: bool, grain: Grain, elements: int) -> Quant:
    learned = Learned(over="tensor", floor=1e-5)
    if bits == 1:
        return Quant(Sign(), grain, learned.but(gradient="value"), Clip(at=0.99 if stretched else 1.0))
    if stretched:
        levels = 3 if bits == 0 else 2**bits
        return Quant(Stretched(levels), grain, learned.but(factor=1 / math.sqrt(elements * max(2**bits // 2 - 1, 1))), Clip())
    return Quant(Ternary() if bits == 0 else Uniform(bits), grain, learned, Clip())


@maps("paretoq")
def paretoq(c: Case) -> Answer:
    bits, grain, stretched = c.p["w_bits"], grain_of(c, "alpha"), c.p["fn"] == "seq" or (c.kind == "linear" and c.p["w_bits"] in (0, 2))
    if stretched and bits < 2:                                    # the paper's own 1.58 bits keep 2/3 of this alpha, its 1 bit reaches to 1
        quant = paretoq_quant(bits, True, grain, c.a["w"].numel())
    else:
        quant = of_weight(bits or 1.58, None if bits == 1 else "stretched" if stretched else "integer", grain)
    return layer(c, quant, None, scale="alpha") if c.kind == "linear" else fake(c, quant, scale="alpha")


@maps("stableqat")
def stableqat(c: Case) -> Answer:
    if any(c.p["amplitude"] or []) or c.p["w_bits"] == 1:
        return None                                               # the paper's estimator
    return fake(c, paretoq_quant(c.p["w_bits"], False, grain_of(c, "alpha"), c.a["w"].numel()), scale="alpha")


@maps("ternarybert")
def ternarybert(c: Case) -> Answer:
    layerwise, bits, clip = c.p["layerwise"], c.p["num_bits"], c.p["clip"]
    if c.p["cls"] == "TwnQuantizer":
        return fake(c, Quant(Ternary(0.7), PerTensor() if layerwise else PerChannel(), AbsMean(), refit=True, clip=clip), "x")
    return fake(c, activations(bits, PerTensor() if layerwise else PerToken(), c.p["cls"] == "AsymQuantizer", clip)[0], "x")


class Rows(Classification):
    """The golden batch as a task."""

    def __init__(self, batch: A) -> None:
        self.only, self.run, self.target, self.extra_rules = batch, Run(progress=False), None, ()

    def batch(self, step: int) -> A:
        return self.only


def bert(c: Case, weights: A) -> BertForSequenceClassification:
    p = c.rest_p["inputs"]
    config = BertConfig(vocab_size=p["vocab"], hidden_size=p["hidden"], num_hidden_layers=p["layers"], num_attention_heads=p["heads"],
                        intermediate_size=p["ffn"], num_labels=p["labels"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                        max_position_embeddings=weights["w:bert.embeddings.position_embeddings.weight"].shape[0],
                        type_vocab_size=weights["w:bert.embeddings.token_type_embeddings.weight"].shape[0])
    model = BertForSequenceClassification(config).eval()
    model.load_state_dict({name.removeprefix("w:"): t for name, t in weights.items() if name.startswith("w:")}, strict=False)
    return model


@maps("teacher_intervention")
def teacher_intervention(c: Case) -> Answer:
    inputs = c.rest["inputs"]
    batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["mask"], "token_type_ids": inputs["types"]}
    task, guide = Rows(batch), Teacher(bert(c, c.rest["teacher"]))
    names = {"hidden": "hidden", "scores": "scores", "probs": "probabilities", "context": "context", "attn_out": "attended", "ao": "projected"}
    where = {ours: find(guide.model, theirs) for ours, theirs in names.items()}
    if c.kind == "teacher":
        logits, found = guide.signals(task, batch, [address for addresses in where.values() for address in addresses])
        return {"logits": logits} | {name: torch.stack([found[a] for a in addresses]) for name, addresses in where.items()}
    model = ternarize(bert(c, c.rest["student"]), task, loss_aware=False, rows=False, embeddings=None, input_bits=8, minmax=False, per_token=None,
                      clip=2.5)
    points = {"M": "map", "C": "context", "O": "output"}
    loss = Imitation(task, guide, model, hidden=1.0, scores=1.0, attended=1.0) if c.p["mode"] == "none" else \
        Intervened(task, guide, model, points[c.p["mode"]], hidden=1.0, scores=1.0, attended=1.0)
    model.train()
    said, theirs = guide.signals(task, batch, loss.read())
    with taps.read(model, [address for addresses in where.values() for address in addresses]) as own:
        logits, read = loss.forward(model, batch, theirs)
    terms = loss.terms(batch, logits, read, said, theirs)
    losses = [terms[name] for name in ("logits", "hidden", "scores", "attended")]
    losses.append(torch.stack(losses).sum())
    parameters = dict(model.named_parameters())
    grads = [dict(zip(parameters, torch.autograd.grad(one, list(parameters.values()), retain_graph=True, allow_unused=True), strict=True))
             for one in losses]
    none = torch.tensor(-1.0)
    norms = [torch.stack([none if grad[name] is None else grad[name].norm() for name in c.p["param_names"]]) for grad in grads]
    answer = {"logits": logits, "losses": torch.stack(losses), "grad_norms": torch.stack(norms)}
    answer |= {name: torch.stack([own[a] for a in addresses]) for name, addresses in where.items()}
    return answer | {f"grad:{name}": grads[-1][name] for name in c.p["full_grads"] if grads[-1][name] is not None}


@maps("bitnet", "w2")
def bitnet(c: Case) -> Answer:
    weight, inputs = bitnet_weight(1.58), bitnet_input()
    if c.kind.startswith("weight") or c.kind == "act":
        dtype = {"bf16": torch.bfloat16}.get(c.p.get("dtype", ""), c.a["y"].dtype)
        return fake(c, inputs if c.kind == "act" else weight, "x" if c.kind == "act" else "w", dtype)
    if c.kind.startswith("auto_online"):
        return layer(c, weight, inputs)
    if c.kind == "gpu_layout":
        stored = weight.quantize(c.a["w"])
        return {"codes": stored.codes, "w_hat": stored.dequantize()}
    if c.kind == "gpu_bitlinear_bf":
        return layer(c, None, inputs)
    codes = Ternary().encode(c.a["codes"].float())
    rows = F.pad(codes, (0, 0, 0, -len(codes) % 4)).unflatten(0, (4, -1))      # a byte holds four rows that lie a quarter of the matrix apart
    packed = {"packed": pack_bits(rows.permute(1, 2, 0), 2).squeeze(-1)} if "packed" in c.a else {}
    if c.kind == "pack":
        return packed
    given = c.a["weight_scale"]                                   # of AutoBitLinear the step, of BitLinear one over it
    step = given if c.kind.startswith("auto") else torch.tensor([1 / given.item()])
    stored = QTensor(codes, step, None, None, Ternary(), PerTensor())
    return packed | {"y": F.linear(Quantizer(inputs)(c.a["x"]), stored.dequantize(), c.a.get("bias"))}


@maps("bit", "alpha_after")
def bit(c: Case) -> Answer:
    p = c.p
    if c.kind.endswith(("fixed", "init")) and c.kind.startswith(("signed", "unsigned")):
        bits, signed = p["num_bits"], p["fn"].endswith("Signed")
        if bits > 1 and not signed:
            return None                                           # subtracts the minimum first
        learned = Learned(AbsMean(2.0 if signed else 4.0, per_root=True), over="tensor", gradient="value" if signed and bits == 1 else "clipped")
        quant = Quant(Sign() if signed and bits == 1 else Uniform(bits, signed), PerTensor(), learned, Clip())
        answer = fake(c, quant, "x", scale="alpha_after")
        x = c.a["x"].clone().requires_grad_()
        quantizer = Quantizer(quant).initialise(x) if p["first_call"] else holding(quant, x.shape, scale=c.a["alpha_after"])
        quantizer.to(x.dtype)(x).backward(c.a["grad_out"])
        return answer | {"alpha_after": quantizer.scale.detach(), "grad_alpha": quantizer.scale.grad}
    return None


@maps("llmqat")
def llmqat(c: Case) -> Answer:
    p = c.p
    if c.kind == "linear":
        if p["w_bits"] > 2:
            return layer(c, Quant(Uniform(p["w_bits"]), scale=AbsMax()), Quant(Uniform(p["a_bits"]), PerToken(), AbsMax()))
        weight = Quant(Sign(), scale=AbsMean()) if p["w_bits"] == 1 else Quant(HalfStep(2), scale=AbsMean(1.0))
        return layer(c, weight, Quant(Uniform(p["a_bits"]), PerToken(), AbsMax()))
    grain = PerTensor() if p["layerwise"] else PerToken()
    symmetric = p["cls"] == "SymQuantizer"
    return fake(c, Quant(Uniform(p["num_bits"], symmetric), grain, AbsMax() if symmetric else MinMax("offset")), "x")


@maps("quest")
def quest(c: Case) -> Answer:
    name = str(c.p.get("cls", ""))
    if "bits" not in c.p or "input" not in c.p or "uncentered" in c.kind or c.p["bits"] != int(c.p["bits"]):
        return None                                               # 1.585 bits: 2^1.585 = 3.00008 levels
    inputs = c.rest[c.p["input"]]
    bits, n = int(c.p["bits"]), 2 ** int(c.p["bits"])
    case = Case(c.file, c.name, c.p, inputs | c.a, c.rest)
    table = dict(zip(c.rest["const"]["bits"].tolist(), c.rest["const"]["scales"].tolist(), strict=True))
    gauss = table[float(bits)]
    rms = Rms(2 * gauss / (n - 1))
    plain = name.removeprefix("Half").removeprefix("Hadamard")
    if plain in ("STEQuantizer", "ClipQuantizer", "TrustQuantizer"):
        estimator = {"S": Ste(), "C": Clip(at=(n - 1) / 2 * c.p.get("clip_scale", 1.0)),
                     "T": Trust(c.p["trust"] * (n - 1) / (2 * gauss) if "trust" in c.p else 0.5)}[plain[0]]
        quant = Quant(HalfStep(bits), PerToken(), rms, estimator)
        if name == plain:
            return fake(case, quant, "x")
        x = inputs["x"].clone().requires_grad_()
        y = Quantizer(quant)(hadamard(x))
        y = y if name.startswith("Half") else hadamard(y)
        y.backward(inputs["grad_out"])
        return {"y": y.detach(), "grad_x": x.grad}
    if name in ("LSQQuantizer", "LSQPlusWeightQuantizer"):
        if c.p.get("raise_zero", True):
            high = n / 2 - 0.5
            learned = Learned(factor=1 / math.sqrt(inputs["x"].numel() * (n / 2 - 1)), margin=-0.5)
            return fake(case, Quant(HalfStep(bits), PerTensor(), learned, Clip(at=high)), "x", scale="step")
        return fake(case, Quant(Uniform(bits, not c.p.get("all_positive")), PerTensor(), Learned(over="tensor"), Clip()), "x", scale="step")
    return None


@maps("efficientqat", "scales", "qzeros", "g_idx")
def efficientqat(c: Case) -> Answer:
    p, a = c.p, c.a
    if c.kind == "pack":
        if 32 % p["bits"]:
            return None                                           # the layout of export/gptq
        return {"qweight": pack_bits(a["codes"], p["bits"]).T}
    if a["w"].shape[1] % p["group_size"]:
        return None
    learned = Learned(MinMax(), factor=1.0, margin=0.5, floor=1e-4)
    return fake(c, Quant(Uniform(p["n_bits"], False), Group(p["group_size"]), learned, Clip(0.5)), scale="scale", zero="zero")


@maps("edgeqat")
def edgeqat(c: Case) -> Answer:
    p = c.p
    if c.kind.startswith("linear"):
        grain = PerTensor() if p["mode"] == "layer_wise" else PerChannel()
        return layer(c, Quant(Uniform(p["nbits_w"]), grain, Learned(over="tensor"), Clip()), None, scale="alpha")
    if c.kind.startswith("act"):
        quant = Quant(Uniform(p["nbits_a"], bool(c.a["signed"].item())), PerTensor(), Learned(MinMax(), over="tensor"), Clip())
        return fake(c, quant, "x", scale="alpha", zero="zp")
    if c.kind.startswith("lsq"):
        grid = Uniform(p["bit"], not p.get("all_positive", False), narrow=p.get("symmetric", False))
        return fake(c, Quant(grid, PerChannel() if p.get("per_channel") else PerTensor(), Learned(over="tensor"), Clip()), scale="alpha")
    return None


@maps("compressed_tensors", "packed_old")
def compressed_tensors(c: Case) -> Answer:
    p, a = c.p, c.a
    if c.kind == "pack":
        codes = Uniform(p["num_bits"]).encode(a["codes"].float())
        return {"packed": pack_bits(codes, p["num_bits"]), "packed_dim0": pack_bits(codes.T.contiguous(), p["num_bits"]).T}
    if c.kind == "fp4":
        codes = unpack_bits(a["fp4_bytes"], 4, tuple(a["fp4"].shape))
        return {"fp4_bytes": pack_bits(Float(2, 1).encode(a["fp4"]), 4), "fp4": Float(2, 1).decode(codes)}
    grain: Grain = {"channel": PerChannel(), "tensor": PerTensor()}.get(p["strategy"]) or Group(p["group_size"])
    scale = AbsMax((2 ** p["num_bits"] - 1) / 2, floor=2.0**-23) if p["symmetric"] else MinMax(floor=2.0**-23)
    stored = Quant(Uniform(p["num_bits"]), grain, scale).quantize(a["w"])
    answer = {"scale": stored.steps, "q": stored.values(), "deq": stored.dequantize(), "fake": Quantizer(Quant(stored.grid, grain, scale))(a["w"])}
    return answer if p["symmetric"] else answer | {"zero": stored.zero}


@maps("hadamard")
def hadamard_map(c: Case) -> Answer:
    x = c.a["x"].clone().requires_grad_()
    y = hadamard(x)
    y.backward(c.a["grad_out"])
    answer = {"y": y.detach(), "yt": hadamard(c.a["x"], transpose=True), "grad_x": x.grad}
    return answer | ({"matrix": hadamard(torch.eye(x.shape[-1], dtype=x.dtype))} if "matrix" in c.a else {})


@maps("aecct", "grad_delta", "scale")
def aecct(c: Case) -> Answer:
    p, a = c.p, c.a
    if c.kind == "absmax":
        return fake(c, Quant(Uniform(p["bits"]), PerTensor(), AbsMax(gradient="statistic", margin=0.5), Clip(0.5)), "x")
    if c.kind == "aap" and a["delta"].item() == 1:
        return fake(c, Quant(Uniform(2, narrow=True), PerTensor(), Percentile(p["percentile"], gradient="statistic", margin=0.5), Clip(0.5)))
    return None                                                   # a learned factor on a statistic is the paper's


@maps("lrqat")
def lrqat(c: Case) -> Answer:
    p = c.p
    if c.kind.startswith("quant_"):
        signed, factor = p["symmetric"], "lsq" if p["grad_scaling"] else 1.0
        quant = Quant(Uniform(p["n_bits"], signed), PerChannel(), Learned(factor=factor, margin=0.5), Clip(0.5))
        return fake(c, quant, scale="delta") if signed else fake(c, quant, scale="delta", zero="zero")
    return None


@maps("qvgen")
def qvgen(c: Case) -> Answer:
    p = c.p
    if c.kind.startswith("LSQ"):
        learned = Learned(factor="lsq" if p["use_grad_scaling"] else 1.0, margin=0.5)
        return fake(c, Quant(Uniform(p["bit"], False), PerChannel(), learned, Clip(0.5)), scale="scale", zero="zero")
    return None


@maps("efficientdm")
def efficientdm(c: Case) -> Answer:
    p, a = c.p, c.a
    if not c.kind.startswith("uaq"):
        return None
    grain = grain_of(c, "delta")
    grid = Uniform(p["n_bits"], False)
    if "grad_out" in a:
        return fake(c, Quant(grid, grain, Learned(MinMax(), factor=1.0, margin=0.5), Clip(0.5)), "x", scale="delta", zero="zero")
    if p.get("scale_method") == "max":
        stored = Quant(grid, grain, MinMax(floor=1e-8)).quantize(a["x"])
        return {"delta": stored.steps, "zero": stored.zero, "y": stored.dequantize()}
    return None


@maps("fimaq")
def fimaq(c: Case) -> Answer:
    p = c.p
    if not c.kind.startswith("uniform"):
        return None
    quant = Quant(Uniform(p["n_bits"], p["symmetric"]), PerChannel(), Learned(factor=1.0, margin=0.5), Clip(0.5))
    return fake(c, quant, scale="scale") if p["symmetric"] else fake(c, quant, scale="scale", zero="zero")


@maps("pbllm")
def pbllm(c: Case) -> Answer:
    p, a = c.p, c.a
    if not c.kind.startswith("high") or p["mse"]:
        return None
    grain = PerChannel() if p["perchannel"] else PerTensor()
    if p["sym"]:
        return {"y": Quant(Uniform(p["bits"]), grain, AbsMax((2 ** p["bits"] - 1) / 2)).hard(a["w"])}
    return {"y": Quant(Uniform(p["bits"], False), grain, MinMax()).hard(a["w"])}


@maps("pdqat")
def pdqat(c: Case) -> Answer:
    if c.kind != "act" or c.p["bits"] > 16:
        return None
    quant = Quant(Uniform(c.p["bits"], False), PerTensor(), Learned(), Clip())
    return fake(Case(c.file, c.name, c.p, c.a | {"step": torch.tensor(1 / (2 ** c.p["bits"] - 1))}, c.rest), quant, "x", scale="step")


@maps("gguf")
def gguf(c: Case) -> Answer:
    layout = {layout.type: layout for layout in LAYOUTS.values()}.get(c.p.get("type", ""))
    if layout is None:
        return None
    q, d = layout.unpack(c.a["bytes"])
    stored = QTensor(Uniform(8).encode(q.float()), d, None, None, Uniform(8), Group(layout.size))
    return {"bytes": layout.pack(q, d), "deq": stored.dequantize()}


# ---- comparing -------------------------------------------------------------------------------------------------------------------------------------

def tolerance(c: Case, theirs: Tensor) -> Tensor | float:
    """float64 1e-12; float32 2e-6 of the largest in the row, 1e-5 for what is a sum (gradients of scales, outputs of layers)."""
    if any(t.dtype == torch.float64 for name, t in c.a.items() if name in ("w", "x")):
        return 1e-12 * float(theirs.abs().nan_to_num().amax())
    elementwise = theirs.shape in {c.a[name].shape for name in ("w", "x") if name in c.a} and "linear" not in c.kind
    return 2e-6 * theirs.abs().nan_to_num().amax(-1, keepdim=True) if elementwise else 1e-5 * float(theirs.abs().nan_to_num().amax())


def differ(c: Case, name: str, ours: Tensor, apart: Tensor, within: float | None) -> str:
    """How ours and theirs differ outside the places `apart`; empty where they do not."""
    theirs = c.a[name]
    if ours.dtype == torch.uint8 and theirs.dtype in (torch.int32, torch.uint8):        # bytes against words, which may end in padding
        if name in ("packed_dim0", "qweight"):
            ours, theirs = ours.T, theirs.T
        if theirs.dtype == torch.uint8 and apart.shape == theirs.shape:
            ours = ours.where(~apart, theirs)
        theirs = theirs.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        same = torch.equal(theirs[..., : ours.shape[-1]], ours) and not theirs[..., ours.shape[-1] :].any()
        return "" if same else "other bytes"
    if ours.numel() != theirs.numel():
        return f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    ours, keep = ours.detach().reshape(theirs.shape), torch.ones_like(theirs, dtype=torch.bool)
    if apart.shape == theirs.shape:
        keep = ~apart
    elif apart.any():
        groups = apart.numel() % theirs.numel() == 0
        keep = ~apart.reshape(theirs.numel(), -1).any(1).reshape(theirs.shape) if groups else torch.zeros_like(keep)
    if name == "codes":                                           # ours count from 0, theirs from where they like
        starts = (ours.int() - theirs.int())[keep].unique()
        return "" if starts.numel() <= 1 else f"other codes: apart by {starts.tolist()}"
    size = tolerance(c, theirs.double())
    far = ((ours.double() - theirs.double()).abs() <= (size if within is None else within * theirs.abs().nan_to_num().amax())).logical_not() & keep
    if not far.any():
        return ""
    gap = (ours - theirs).double().abs().masked_fill(~far, 0)
    return f"{int(far.sum())} of {far.numel()} off, by up to {float(gap.max()):.2g} where the largest is {float(theirs.abs().max()):.2g}"


def apart(places: list[Any], name: str) -> Tensor:
    """The places of one output that are refused."""
    masks = [p.get(name) if isinstance(p, dict) else p for p in places]
    held = [m for m in masks if m is not None]
    return torch.stack(held).any(0) if held else torch.zeros((), dtype=torch.bool)


def any_of(place: Any) -> bool:
    """Whether a refusal leaves anything out."""
    return any(any_of(p) for p in place.values()) if isinstance(place, dict) else bool(torch.as_tensor(place).any())


@pytest.mark.parametrize("c", CASES, ids=lambda c: f"{c.file}-{c.name}")
def test_golden(c: Case, record_property: Callable[[str, Any], None]) -> None:
    arrays = c.rest.get(c.p.get("input", ""), {}) | c.a           # some files keep the inputs of many cases in one
    refused = [r for r in REFUSED if r.file == c.file and r.when(c.p, arrays)]
    record_property("golden", (c.file, c.kind))
    whole = [r.reason for r in refused if r.within is None and r.where(c.p, arrays) is True]
    if set(c.a) <= {"x", "grad_out"} or c.kind in ("inputs", "student"):
        record_property("outcome", "only inputs")
        pytest.skip("the inputs of other cases")
    answer = MAPS[c.file](c) if c.file in MAPS and not whole else None
    if answer is None:
        record_property("outcome", f"refused: {whole[0]}" if whole else "uncovered")
        pytest.skip(whole[0] if whole else "uncovered")
    places = [r.where(c.p, arrays) for r in refused if r.within is None]
    within = max((r.within for r in refused if r.within is not None), default=None)
    outputs = {name for name in c.a if name[0] in "yq" or name in ("deq", "fake", "bytes") or name.startswith(("grad_", "packed"))} - {"grad_out"}
    outputs |= {name for name in c.a if c.file == "teacher_intervention" and not name.startswith("w:")}
    missing = outputs - set(answer) - LACKS[c.file]
    assert not missing, f"the map answers {sorted(answer)} but not {sorted(missing)}"
    wrong = {name: how for name, ours in answer.items() if name in c.a and (how := differ(c, name, ours, apart(places, name), within))}
    assert not wrong, wrong
    partly = [r.reason for r, place in zip((r for r in refused if r.within is None), places, strict=True) if any_of(place)]
    partly += [r.reason for r in refused if r.within is not None]
    record_property("outcome", f"passed, but for: {partly[0]}" if partly else "passed")
