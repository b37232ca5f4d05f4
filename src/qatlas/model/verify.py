"""Verify: what was trained is what runs. Every claim of equality is a `Proof`: what was compared, by whose reader, and how it came out.

    sha256               the files are those that the run wrote (where its record has their sums)
    from_pretrained      the saved directory through transformers: the logits of the trained model, bit for bit, where that is still in memory;
                         and the same through the Auto class
    proof.py             each exported file by its format's reader, transformers, and the engines that are installed

A file that cannot be read any more is a proof that failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.error import CheckpointError, FormatError
from ..export import named, place
from .pack import load_packed
from .probe import images
from .proof import Proof, answered, prove

AUTO = {"ForSequenceClassification": "AutoModelForSequenceClassification", "ForImageClassification": "AutoModelForImageClassification"}


def exports(directory: Path) -> dict[str, Path]:
    """Target -> file, for the exports that lie in a run's directory."""
    home = directory / "exports"
    found = [name for path in sorted(home.iterdir()) if (name := named(path.name)) is not None] if home.is_dir() else []
    return {name: path for name in found if (path := place(home, name)).exists()}


def verify(directory: str | Path, target: str | None = None, prompts: Sequence[Sequence[int]] = (),
           sums: Mapping[str, str] | None = None, trained: nn.Module | None = None) -> list[Proof]:
    """Read back what a run's directory holds, and compare it with the packed model there.

    target: one export only. prompts: token ids to ask a language model about; a few fixed ones when empty. sums: file -> sha256, as the run's record
    has them. trained: the packed model that was saved there, where it is still in memory; without it what was saved is what was loaded.

    Raises:
        FormatError: an export that is not there. CheckpointError: a directory that is no model.
    """
    directory = Path(directory)
    found = exports(directory)
    if target is not None and target not in found:
        raise FormatError(f"{directory} holds no export {target!r}; it holds {', '.join(found) or 'none'}. "
                          "Write one with: qatlas export DIR --target T")
    proofs = [_unchanged(directory, sums)] if sums else []
    try:
        model = load_packed(directory)
    except CheckpointError as error:
        if all(proof.passed for proof in proofs):
            raise
        return [*proofs, Proof("the saved directory loads", "transformers from_pretrained", False, str(error))]
    asked = _questions(model, prompts)
    proofs += [] if trained is None else [_reloaded(trained, model, asked)]
    proofs.append(_auto(model, directory, asked))
    for name, path in found.items():
        if target in (None, name):
            proofs += prove(model if trained is None else trained, name, path, asked)
    return proofs


def _unchanged(directory: Path, sums: Mapping[str, str]) -> Proof:
    wrong = [name for name, value in sums.items() if not (directory / name).is_file() or _sum(directory / name) != value]
    result = f"{len(sums)} files as written" if not wrong else f"changed or gone: {', '.join(wrong)}"
    return Proof("the files are those that the run wrote", "sha256 in record.json", not wrong, result)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _questions(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Eight fixed inputs of one row each: ids (1, tokens), or pixels (1, channels, height, width) where the model sees images."""
    if prompts:
        return [torch.tensor([list(prompt)]) for prompt in prompts]
    draw = torch.Generator().manual_seed(0)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        return [torch.randn(1, *images(model), generator=draw) for _ in range(8)]
    low = min(3, model.config.vocab_size - 1)
    return list(torch.randint(low, model.config.vocab_size, (8, 1, 16), generator=draw))


def _reloaded(trained: nn.Module, model: nn.Module, asked: list[Tensor]) -> Proof:
    same = torch.equal(answered(trained, asked), answered(model, asked))
    return Proof("the saved directory computes what the trained model computes", "transformers from_pretrained", same,
                 f"logits of {len(asked)} prompts {'equal' if same else 'differ'}")


def _auto(model: nn.Module, directory: Path, asked: list[Tensor]) -> Proof:
    """Says only that the general way of loading finds the same class and settings: both sides read the same file."""
    import transformers

    name = type(model).__name__
    auto = next((auto for end, auto in AUTO.items() if name.endswith(end)), "AutoModelForCausalLM")
    again = getattr(transformers, auto).from_pretrained(directory, local_files_only=True)
    same = torch.equal(answered(model, asked), answered(again, asked))
    return Proof(f"{auto} loads the directory as {name} does", "transformers from_pretrained", same,
                 f"logits of {len(asked)} prompts {'equal' if same else 'differ'}")
