"""Proof: an exported file held against the model that it was made from, by the format's public reader and by the engines that are installed.

    the format's reader  every weight of the exported file: the same values, bit for bit
    transformers         the exported file dequantized: the same logits as the trained model with its input quantizers off
                         (a format that says how inputs are quantized: the model itself, loaded by transformers, with everything on; within TIES
                         where the format says that its layers quantize inputs in another order of operations)
    onnxruntime          a file that holds the whole computation: the logits of the trained model, within TIES or SUMS of the largest
    OpenVINO             the same file: every weight bit for bit by its reading, and the same logits, where it is installed and reads such a file
    ExecuTorch           a program for XNNPACK: the logits of the trained model, within TIES of the largest
    the engine           llama.cpp itself: close, not equal, since it rounds the inputs of every product in its own way (see export.gguf.llamacpp)

All but logits of engines are equalities: a single bit is a failure. onnxruntime and OpenVINO sum in another order, and where activations are
quantized a value within the last bit of a tie falls on the other side; onnxruntime's optimizations are off (see export.onnx). The engine is stated as
the largest difference of a log-probability among the ten most probable tokens, and as the share of prompts on which both sides choose the same
token. A file that cannot be read any more is a proof that failed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.error import QatlasError, foreign
from ..core.qtensor import QTensor
from ..core.quantizer import Quantizer
from ..export import target as find_target
from ..layers import attention
from ..layers.quantized import Layer
from .inner import installed
from .pack import checkpoint

ENGINE_TOLERANCE = 0.5                                            # of a log-probability: beyond it the file does not mean what we think
TIES, SUMS = 0.1, 1e-4                                            # of the largest logit, with and without quantized activations
READER = "the format's public reader"


@dataclass
class Proof:
    """One comparison. passed: None where it could not be made, and `result` says why."""

    claim: str
    reader: str
    passed: bool | None
    result: str
    tolerance: str = "equal"


def prove(model: nn.Module, target: str, path: Path, asked: list[Tensor]) -> list[Proof]:
    """The proofs of one exported file; where one fails the later ones would say nothing new. asked: inputs of one row each."""
    form, _ = find_target(target)
    if hasattr(form, "lacks") and form.lacks():
        return [Proof(f"{target} holds the trained weights", READER, None, form.lacks(), "")]
    try:
        gone, left_out = form.unused(path) if hasattr(form, "unused") else ([], [])
        first = _weights(model, target, form.read(path), form.types(path) if hasattr(form, "types") else {}, gone)
    except QatlasError as error:
        left_out = []
        first = Proof(f"{target} holds the trained weights", READER, False, str(error))
    proofs = [first]
    if first.passed and hasattr(form, "logits"):
        proofs.append(_bare(model, target, path, form.logits, asked))
    if first.passed and hasattr(form, "model"):
        proofs.append(_loaded(model, target, path, form, asked))
    for engine in getattr(form, "ENGINES", ()) if first.passed else ():
        proofs += _engines(model, target, path, engine, asked, left_out)
    if first.passed and hasattr(form, "engine"):
        proofs.append(_engine(model, target, path, form.engine, asked))
    return proofs


def _bare(model: nn.Module, target: str, path: Path, ask: Any, asked: list[Tensor]) -> Proof:
    claim, reader = f"{target} computes what the packed weights compute, inputs unquantized", "transformers, gguf_file"
    with _inputs_off(model):
        ours = answered(model, asked)
    try:
        with foreign(f"transformers cannot run {path}"):
            theirs = ask(path, [rows[0].tolist() for rows in asked])
    except QatlasError as error:
        return Proof(claim, reader, False, str(error))
    if isinstance(theirs, str):
        return Proof(claim, reader, None, theirs, "")
    same = torch.equal(ours, theirs)
    return Proof(claim, reader, same, f"logits of {len(asked)} prompts {'equal' if same else f'differ by up to {_apart(ours, theirs)}'}")


def _apart(ours: Tensor, theirs: Tensor) -> str:
    return f"{float((ours - theirs).abs().max()):.1e}" if ours.shape == theirs.shape else f"{tuple(ours.shape)} and {tuple(theirs.shape)}"


def _loaded(model: nn.Module, target: str, path: Path, form: Any, asked: list[Tensor]) -> Proof:
    """Equal; or, where the format says why it only comes near, within TIES of the largest logit."""
    claim, reader = f"{target} computes what the packed model computes", "transformers from_pretrained"
    tolerance = "equal"
    try:
        with foreign(f"what transformers loads from {path} does not answer"):
            if why := form.near(path) if hasattr(form, "near") else None:
                tolerance = f"{TIES:g} of the largest logit: {why}"
            theirs = form.model(path)
            if isinstance(theirs, str):
                return Proof(claim, reader, None, theirs, "")
            answers = answered(theirs, asked)
    except QatlasError as error:
        return Proof(claim, reader, False, str(error), tolerance)
    ours = answered(model, asked)
    if why:
        return Proof(claim, reader, *_close(ours, answers, TIES), tolerance)
    same = torch.equal(ours, answers)
    off = "" if same else f" by up to {_apart(ours, answers)}"
    return Proof(claim, reader, same, f"logits of {len(asked)} prompts {'equal' if same else f'differ{off}'}")


def _weights(model: nn.Module, target: str, found: dict[str, Tensor], types: Mapping[str, int], gone: Sequence[str] = ()) -> Proof:
    """gone: tensors that a file with the whole computation does not hold because it does not use them; that it does not, its logits show."""
    made, form = checkpoint(model), find_target(target)[0]
    ours = {name: t for name, t in made.tensors.items() if name not in gone}
    kept = form.kept if hasattr(form, "kept") else lambda config, name, t: t
    values = {name: t.dequantize() if isinstance(t, QTensor) else kept(made.config, name, t.float()) for name, t in ours.items()}
    wrong = [name for name, t in values.items() if name not in found or not torch.equal(t, found[name])]
    count = sum(isinstance(t, QTensor) for t in ours.values())
    more = f", as {', '.join(f'{n} {kind}' for kind, n in types.items())}" if types else ""
    more += f"; {len(gone)} that the computation does not use" if gone else ""
    result = f"{len(wrong)} tensors differ, for instance {wrong[0]}" if wrong else f"{len(ours)} tensors ({count} quantized) equal bit for bit{more}"
    return Proof(f"{target} holds the trained weights", READER, not wrong, result)


def _engines(model: nn.Module, target: str, path: Path, engine: Any, asked: list[Tensor], left_out: Sequence[str]) -> list[Proof]:
    """What one engine makes of a file with the whole computation; the first is the public reader, whose weights are proved already."""
    form, _ = find_target(target)
    claim = f"{target} holds the trained weights"
    if why := engine.why_not(path):
        return [Proof(claim, engine.NAME, None, why, "")]
    weights = []
    if engine is not form.ENGINES[0]:
        try:
            weights = [_weights(model, target, form.read(path, engine), {}, form.unused(path)[0])]
        except QatlasError as error:
            weights = [Proof(claim, engine.NAME, False, str(error))]
        weights[0].reader = engine.NAME
        if not weights[0].passed:
            return weights
    return [*weights, _computed(model, target, path, engine, asked, left_out)]


def _computed(model: nn.Module, target: str, path: Path, engine: Any, asked: list[Tensor], left_out: Sequence[str]) -> Proof:
    bare = f"with its inputs in full precision: the target leaves {len(left_out)} quantizers out"
    claim = f"{target} computes what the trained model computes" + (f", {bare}" if left_out else "")
    quantized = not left_out and any(q.on for q in _activations(model))
    limit = TIES if quantized else SUMS
    tolerance = f"{limit:g} of the largest logit: sums run in another order" + (", ties of activations fall either way" if quantized else "")
    with _inputs_off(model) if left_out else contextlib.nullcontext():
        ours = answered(model, asked)
    try:
        with foreign(f"{engine.NAME} cannot run {path}"):
            theirs = find_target(target)[0].answers(path, asked, engine)
    except QatlasError as error:
        return Proof(claim, engine.NAME, False, str(error), tolerance)
    return Proof(claim, engine.NAME, *_close(ours, theirs, limit), tolerance)


def _close(ours: Tensor, theirs: Tensor, limit: float) -> tuple[bool, str]:
    """Whether logits differ by no more than a share of the largest one, and by how much they do."""
    if ours.shape != theirs.shape:
        return False, f"logits of shape {tuple(theirs.shape)}, ours are {tuple(ours.shape)}"
    off, most = float((ours - theirs).abs().max()), float(ours.abs().max())
    same = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    result = f"logits within {off:.1e}, the largest being {most:.2g}; the same first answer on {same} of {len(ours)} inputs"
    return off <= limit * most, result


def _engine(model: nn.Module, target: str, path: Path, ask: Any, asked: list[Tensor]) -> Proof:
    claim, reader = f"{target} runs, and says what the trained model says", "llama.cpp (xllamacpp)"
    tolerance = f"{ENGINE_TOLERANCE}: the engine rounds the inputs of every product to 8 bits in blocks of its own"
    try:
        answers = ask(path, [rows[0].tolist() for rows in asked])
    except QatlasError as error:
        return Proof(claim, reader, False, str(error), tolerance)
    if isinstance(answers, str):
        return Proof(claim, reader, None, answers, "")
    ours = answered(model, asked).log_softmax(-1)                 # (prompts, vocabulary)
    off, same = 0.0, 0
    for row, top in zip(ours, answers, strict=True):
        off = max(off, *(abs(float(row[token]) - value) for token, value in top.items()))
        same += int(row.argmax()) == max(top, key=top.__getitem__)
    result = f"top-10 log-probabilities within {off:.3f}; the same first token on {same} of {len(asked)} prompts"
    return Proof(claim, reader, off <= ENGINE_TOLERANCE, result, tolerance)


@torch.no_grad()
def answered(model: Any, asked: list[Tensor]) -> Tensor:
    """(prompts, vocabulary or classes): logits after each prompt, prompt by prompt."""
    found = [model(**{getattr(model, "main_input_name", "input_ids"): rows}).logits.float() for rows in asked]
    return torch.cat([logits[:, -1] if logits.dim() == 3 else logits for logits in found])


@contextlib.contextmanager
def _inputs_off(model: nn.Module) -> Iterator[None]:
    """Quantizers of activations off, and the attention that transformers takes by itself: a file of weights holds neither."""
    inside = list(installed(model).values())
    found = [(q, q.on) for q in _activations(model)]
    other: Any = model
    for quantizer, _ in found:
        quantizer.on = False
    if inside:
        other.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    try:
        yield
    finally:
        if inside:
            other.set_attn_implementation(attention.NAME)
        for quantizer, on in found:
            quantizer.on = on


def _activations(model: nn.Module) -> list[Quantizer]:
    """All quantizers of activations, on or off."""
    layers = [layer for layer in model.modules() if isinstance(layer, Layer)]
    return [*installed(model).values(), *(q for layer in layers for q in (layer.input_quantizer, layer.output_quantizer) if q is not None)]
