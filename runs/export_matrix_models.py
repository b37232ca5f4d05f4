"""The models of runs/export_matrix.py: which forms of quantization there are, which target is tried with which, and what the trained model says.

A form is trained once and kept in a directory; a run that finds it does not train again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lsq_stories260k import setting
from torch import Tensor, nn

from qatlas.model.graph import graph
from qatlas.model.load import load
from qatlas.model.pack import checkpoint, load_packed, pack, save
from qatlas.model.program import program
from qatlas.model.quantized import quantized
from qatlas.model.rules import Rule
from qatlas.papers.bitnet import bitnet
from qatlas.papers.lsq import lsq
from qatlas.train.run import Run
from qatlas.train.task import LanguageModelling

STEPS, RATE, BATCH, LENGTH = 40, 1e-3, 4, 128
WINDOWS, WINDOW = 8, 257                                          # of the text that judges the zoo's model: 256 predicted tokens each


@dataclass(frozen=True)
class Form:
    """One way of being quantized. says: in words. paper: model, task, steps -> trained. target: for which it is trained. full: globs of layers in
    full precision. short: whether what is not quantized is rounded, after training, to numbers that fp16 and bf16 have."""

    says: str
    paper: Callable[..., nn.Module]
    target: str
    full: tuple[str, ...] = ()
    short: bool = False


def forms(model: str, bits: float) -> dict[str, Form]:
    """Name -> what is trained. stories' down projections have 172 inputs, no multiple of 32, and gate and up as many outputs."""
    n = math.ceil(bits)
    plain, down = partial(lsq, bits=bits, lr=RATE, distil=True), ("*.down_proj",) if model == "stories" else ()
    out = {"channel": Form("one step a channel", plain, f"compressed-tensors:w{n}a16")}
    if model == "stories":
        out["groups"] = Form("groups of 32, down_proj in full precision", partial(plain, group=32), f"compressed-tensors:w{n}a16", down)
        out["attention"] = Form("groups of 32, the MLP in full precision", partial(plain, group=32), f"compressed-tensors:w{n}a16", ("*.mlp.*",))
    out["inputs"] = Form("one step a channel, inputs of 8 bits a token", partial(plain, input_bits=8), "compressed-tensors:w8a8")
    out["zero"] = Form("one step a channel, inputs of 8 bits a token with a zero", partial(plain, input_bits=8), f"torchao:w{n}a8")
    out["mobile"] = Form("one step a channel, inputs of 8 bits a token with XNNPACK's zero", partial(plain, input_bits=8), "executorch:int4")
    out["static"] = Form("one step a channel, inputs of 8 bits a tensor", partial(plain, input_bits=8, static=True), "onnx:int8")
    out["short"] = Form("one step a channel, all else rounded to 16 bits after training", plain, f"compressed-tensors:w{n}a16", short=True)
    if bits < 4:
        out["powers"] = Form("groups of 32, steps that are powers of two" + (", down_proj in full precision" if down else ""),
                             partial(plain, group=32), "gguf:mxfp4", down)
    if bits == 1.58:
        out["matrix"] = Form("one step a matrix, inputs of 8 bits a token (BitNet)", partial(bitnet, bits=bits, lr=RATE), "bitnet:bitlinear")
    return out


def order(target: str, known: dict[str, Form]) -> list[str]:
    """The forms in which a target is tried: first the one that it is for."""
    form, _, kind = target.partition(":")
    first = {"onnx": "channel" if kind.endswith("-weights") else "static", "bitnet": "matrix", "executorch": "mobile"}.get(form, "channel")
    if kind.endswith("a8") or kind == "fp8_dynamic":
        first = "zero" if form == "torchao" else "inputs"
    if form == "gguf":
        first = {"mxfp4": "powers", "f16": "short", "bf16": "short"}.get(kind, first)
    rest = [name for name in known if name in ("channel", "groups", "attention")]
    return [name for name in dict.fromkeys([first, *rest]) if name in known]


@dataclass
class Asked:
    """A trained model in one form, what it says, and what exporters take."""

    model: nn.Module
    folder: Path
    logits: list[Tensor]                                          # (tokens, vocabulary) of each text
    perplexity: float
    graphs: dict[int, Any] = field(default_factory=dict)

    def data(self, form: Any = None, kind: str = "") -> Any:
        """The checkpoint; with its computation where the format holds that."""
        made = checkpoint(self.model, self.folder, self.folder.name)
        if hasattr(form, "OPSETS"):
            opset = form.OPSETS[kind]
            made.graph = self.graphs[opset] = self.graphs.get(opset) or graph(self.model, opset)
        elif hasattr(form, "TRACED"):
            made.graph = program(self.model)
        return made


class Place:
    """A model, its text, and how it is judged."""

    def __init__(self, name: str, scratch: Path, steps: int) -> None:
        self.name, self.scratch, self.steps, self.exports = name, scratch, steps, scratch / f"{name}-exports"
        if name == "stories":
            self.source, _, self.tokenizer, self.text, real = setting(Path(os.environ["QATLAS_DATA"]), scratch, 256)
            self.texts = [self.tokenizer(part.strip(), return_tensors="pt")["input_ids"] for part in real.split("<|endoftext|>") if part.strip()]
        else:
            self.source, self.text = "zoo:gpt", "builtin:docs"
            self.tokenizer = load(self.source)[1]
            held = LanguageModelling(self.text, self.tokenizer, length=WINDOW, batch=1)
            self.texts = [batch["input_ids"] for batch, _ in zip(held.held_out(), range(WINDOWS), strict=False)]
        self.trained = cache(self._trained)

    @property
    def tokens(self) -> int:
        """How many are predicted."""
        return sum(ids.shape[1] - 1 for ids in self.texts)

    def _trained(self, bits: float, name: str) -> Asked:
        """Trained, or found where it was trained before."""
        form, folder = forms(self.name, bits)[name], self.scratch / f"{self.name}-w{bits:g}-{name}"
        if not folder.exists():
            torch.manual_seed(0)
            rules = tuple(Rule(where, weight=None, input=None, optional=True) for where in form.full)
            task = LanguageModelling(self.text, self.tokenizer, length=LENGTH, batch=BATCH, target=form.target, extra_rules=rules,
                                     run=Run(None, seed=0, progress=False))
            model = form.paper(load(str(self.source))[0], task, steps=self.steps)
            if form.short:
                shorten(model)
            save(pack(model), folder, self.tokenizer)
        model = load_packed(folder)
        with torch.no_grad():
            logits = [model(input_ids=ids).logits[0].float() for ids in self.texts]
        return Asked(model, folder, logits, perplexity(logits, self.texts))


@torch.no_grad()
def shorten(model: nn.Module) -> None:
    """Round what is not quantized."""
    for name, parameter in model.named_parameters():
        if not any(name.startswith(f"{layer}.") for layer in quantized(model)):
            parameter.copy_(parameter.bfloat16().half().float())


def perplexity(logits: list[Tensor], texts: list[Tensor]) -> float:
    """Per token."""
    chosen = [said[:-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None]) for said, ids in zip(logits, texts, strict=True)]
    return math.exp(-float(torch.cat(chosen).mean()))
