"""Verify: what was trained is what runs. Every claim of equality is a `Proof`: what was compared, by whose reader, and how it came out.

    from_pretrained      the saved directory through transformers: the same logits, bit for bit
    the format's reader  every weight of the exported file: the same values, bit for bit
    transformers         the exported file dequantized: the same logits as the trained model with its input quantizers off
    the engine           llama.cpp itself: close, not equal, since it rounds the inputs of every product in its own way (see export.gguf.llamacpp)

The first three are equalities: a single bit is a failure. The last one is stated as the largest difference of a log-probability among the ten most
probable tokens, and as the share of prompts on which both sides choose the same token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.error import FormatError
from ..core.qtensor import QTensor
from ..export import target as find_target
from ..layers.packed import Packed
from .pack import checkpoint, load_packed

ENGINE_TOLERANCE = 0.5                                            # of a log-probability: beyond it the file does not mean what we think


@dataclass
class Proof:
    """One comparison. passed: None where it could not be made, and `result` says why."""

    claim: str
    reader: str
    passed: bool | None
    result: str
    tolerance: str = "equal"


def exports(directory: Path) -> dict[str, Path]:
    """Target -> file, for the exports that lie in a run's directory."""
    found = sorted((directory / "exports").glob("*/model.*")) if (directory / "exports").is_dir() else []
    return {path.parent.name.replace("-", ":", 1): path for path in found}


def verify(directory: str | Path, target: str | None = None, prompts: Sequence[Sequence[int]] = ()) -> list[Proof]:
    """Read back what a run's directory holds, and compare it with the packed model there.

    target: one export only. prompts: token ids to ask the engine about; a few fixed ones when empty.

    Raises:
        FormatError: an export that is not there. CheckpointError: a directory that is no model.
    """
    directory = Path(directory)
    model = load_packed(directory)
    found = exports(directory)
    if target is not None and target not in found:
        raise FormatError(f"{directory} holds no export {target!r}; it holds {', '.join(found) or 'none'}. Write one with: qatlas export DIR --target T")
    ids = [list(prompt) for prompt in prompts] or _prompts(model)
    proofs = [_reloaded(model, directory, ids)]
    for name, path in found.items():
        if target in (None, name):
            proofs += _export(model, name, path, ids)
    return proofs


def _prompts(model: Any) -> list[list[int]]:
    """Eight fixed prompts of 16 tokens."""
    rows = torch.randint(3, model.config.vocab_size, (8, 16), generator=torch.Generator().manual_seed(0))
    return rows.tolist()


def _reloaded(model: nn.Module, directory: Path, ids: list[list[int]]) -> Proof:
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    same = torch.equal(_last(model, ids), _last(again, ids))
    return Proof("the saved directory computes what the packed model computes", "transformers from_pretrained", same,
                 f"logits of {len(ids)} prompts {'equal' if same else 'differ'}")


def _export(model: nn.Module, target: str, path: Path, ids: list[list[int]]) -> list[Proof]:
    form, kind = find_target(target)
    proofs = [_weights(model, target, form.read(path))]
    if hasattr(form, "logits"):
        with _inputs_off(model):
            same = torch.equal(ours := _last(model, ids), theirs := form.logits(path, ids))
            off = float((ours - theirs).abs().max())
        proofs.append(Proof(f"{target} computes what the packed weights compute, inputs unquantized", "transformers, gguf_file", same,
                            f"logits of {len(ids)} prompts {'equal' if same else f'differ by up to {off:.1e}'}"))
    if hasattr(form, "engine"):
        proofs.append(_engine(model, target, path, form.engine, ids))
    return proofs


def _weights(model: nn.Module, target: str, found: dict[str, Tensor]) -> Proof:
    ours = checkpoint(model).tensors
    wrong = [name for name, t in ours.items() if name not in found or not torch.equal(t.dequantize() if isinstance(t, QTensor) else t.float(), found[name])]
    count = sum(isinstance(t, QTensor) for t in ours.values())
    result = f"{len(ours)} tensors ({count} quantized) equal bit for bit" if not wrong else f"{len(wrong)} tensors differ, for instance {wrong[0]}"
    return Proof(f"{target} holds the trained weights", "the format's public reader", not wrong, result)


def _engine(model: nn.Module, target: str, path: Path, ask: Any, ids: list[list[int]]) -> Proof:
    claim, reader = f"{target} runs, and says what the trained model says", "llama.cpp (xllamacpp)"
    answers = ask(path, ids)
    if isinstance(answers, str):
        return Proof(claim, reader, None, answers, "")
    ours = _last(model, ids).log_softmax(-1)                      # (prompts, vocabulary)
    off, same = 0.0, 0
    for row, top in zip(ours, answers, strict=True):
        off = max(off, *(abs(float(row[token]) - value) for token, value in top.items()))
        same += int(row.argmax()) == max(top, key=top.__getitem__)
    return Proof(claim, reader, off <= ENGINE_TOLERANCE, f"top-10 log-probabilities within {off:.3f}; the same first token on {same} of {len(ids)} prompts",
                 f"{ENGINE_TOLERANCE}: the engine rounds the inputs of every product to 8 bits in blocks of its own")


@torch.no_grad()
def _last(model: Any, ids: list[list[int]]) -> Tensor:
    """(prompts, vocabulary): logits after each prompt, prompt by prompt."""
    return torch.cat([model(torch.tensor([prompt])).logits[:, -1].float() for prompt in ids])


@contextlib.contextmanager
def _inputs_off(model: nn.Module) -> Iterator[None]:
    """Input quantizers off: a file of weights cannot hold them."""
    found = [(q, q.on) for layer in model.modules() if isinstance(layer, Packed) and (q := layer.input_quantizer) is not None]
    for quantizer, _ in found:
        quantizer.on = False
    try:
        yield
    finally:
        for quantizer, on in found:
            quantizer.on = on
