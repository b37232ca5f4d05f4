"""What a run leaves in its directory besides record and report: the packed model, and the exports. Each file is there whole or not at all.

    out/model.safetensors, config.json, tokenizer.json ...      `place`
    out/exports/<target>/                                       `export`, `add_export`: model.<suffix>, or a directory of the format
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from .export import files
from .export import place as place_of
from .export import target as find_target
from .model.graph import graph
from .model.pack import checkpoint, load_packed, save
from .model.program import program
from .record import Record
from .train.resume import sha256


def place(model: nn.Module, out: Path, tokenizer: Any) -> list[Path]:
    """Save the packed model among the other things of a run's directory, file by file, each whole or not at all; the files."""
    aside = out / ".model"
    for stale in (aside, *out.glob(f".{aside.name}.*.part")):     # of a run that was killed here
        shutil.rmtree(stale, ignore_errors=True)
    save(model, aside, tokenizer)
    names = sorted(path.name for path in aside.iterdir())
    for name in names:
        os.replace(aside / name, out / name)
    aside.rmdir()
    return [out / name for name in names]


def folder(directory: Path, target: str) -> Path:
    """Where an export lies."""
    form, kind = find_target(target)
    at = place_of(directory / "exports", f"{target.partition(':')[0]}:{kind}")
    return at.parent if form.SUFFIX else at


def export(directory: Path, target: str, model: nn.Module | None = None) -> Path:
    """Write an artefact into directory/exports/<target>/ from the packed model there.

    Raises:
        FormatError: a target that cannot hold the model, or that was written already.
    """
    form, kind = find_target(target)
    model = load_packed(directory) if model is None else model
    has_vocabulary = (directory / "tokenizer.json").is_file()
    data = checkpoint(model, directory if has_vocabulary else None, directory.resolve().name)
    if hasattr(form, "OPSETS"):                                   # a format that holds the computation too, as ONNX
        data.graph = graph(model, form.OPSETS[kind])
    elif hasattr(form, "TRACED"):                                 # or as torch.export has it
        data.graph = program(model)
    return form.write(data, place_of(directory / "exports", target), kind)


def size(artefact: Path) -> int:
    """Bytes of an export's weights, with what lies in the same file: of a directory its safetensors files."""
    return sum(file.stat().st_size for file in files(artefact) if artefact.is_file() or file.suffix == ".safetensors")


def add_export(directory: Path, target: str) -> Path:
    """Export a run that ended, and note the file in its record.

    Raises:
        FormatError, CheckpointError: see `export`; nothing is left behind.
    """
    path = export(directory, target)
    if (directory / "record.json").is_file():
        record = Record.read(directory)
        record.sizes[target] = size(path)
        record.sums |= {file.relative_to(directory).as_posix(): sha256(file) for file in files(path)}
        record.write(directory)
    return path
