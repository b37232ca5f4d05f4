"""Floor 2: formats. One file or folder a format; each sees the numbers of floor 1 and nothing else of ours.

A format module has

    TARGETS      name -> the Quant that it would choose itself, or None where it stores plain values
    fit          a Quant moved onto the target, or FormatError with the reason and the nearest that can; with body=False (embeddings, heads) onto
                 another type of the format, where the target's own is not exact
    why_not      the reason alone, or None
    write        Checkpoint -> file; the trained codes are packed as they are, never quantized again
    read         file -> tensors under their Hugging Face names, through the format's public reader
    SUFFIX       of its file; empty where the artefact is a directory, which `write` makes and `read` takes in the same way
    types        file -> how many tensors of which type

and where they make sense

    plan         what each tensor becomes, or FormatError: asked before training, with tensors in full precision
    fit_input    as `fit`, of a layer's input, for a format that says how inputs are quantized; others leave inputs alone
    lacks        the sentence for a missing package that `read` needs, or None
    logits       file, prompts -> what transformers computes with the file's weights, inputs in full precision, or a sentence on why it cannot
    kept         config, name, plain tensor -> what `read` gives back for it, for a format that stores some otherwise (GGUF: Gemma's norms)
    model        artefact -> the transformers model that it loads as, inputs quantized, or a sentence on why not
    near         artefact -> why that model's logits come only close to the trained ones, or None where they are equal
    qtensors     artefact -> name -> QTensor or Tensor: the start of further training. It never trusts the file
    holds        path -> whether the artefact is of this format, by its config or magic bytes alone
    engine       file, prompts -> what an engine says, or a sentence on why it was not asked
    ENGINES      of a format that holds the whole computation: modules with a NAME, why_not (file -> the sentence for one that this engine cannot be
                 asked about, or None) and start; `read` and `answers` take one of them, the first by default
    answers      file, inputs, engine -> the logits that it computes
    unused       file -> tensors that the computation does not use, and quantizers of activations that it leaves out
    OPSETS       target -> the opset of the graph that `write` takes (model.graph); or
    TRACED       of a format whose `write` takes the computation as torch.export has it (model.program)

and, where others' artefacts are the start of further training,

    holds        path -> whether the artefact is of this format, by its config or its first bytes alone
    qtensors     artefact -> Hugging Face name -> QTensor or Tensor: codes and steps as they are, `QTensor.dequantize()` bit for bit what the format's
                 own decode returns, plain tensors as they are. The file is not trusted: lengths, shapes and indices are checked, and what has no such
                 form is a FormatError that names the file, the tensor and what was found
    inputs       artefact -> layer -> Signal, for a format that says how inputs are quantized
    config       artefact -> config.json as a dict, for a format that has no such file
    tokenizer    artefact -> the tokenizer that it holds itself, or None

It is found by listing this folder: `target("gguf:q4_0")` is the module gguf and its target q4_0. There is no registry.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from ..core.error import FormatError, unknown
from .checkpoint import Checkpoint

__all__ = ["Checkpoint", "files", "formats", "holder", "named", "place", "readable", "target", "targets"]


def formats() -> list[str]:
    """The formats there are, in the spelling of a target string.

    >>> "gguf" in formats()
    True
    """
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__) if module.ispkg)


def targets() -> list[str]:
    """All targets of all formats.

    >>> "gguf:q4_0" in targets()
    True
    """
    return [f"{form}:{kind}" for form in formats() for kind in importlib.import_module(f"{__name__}.{form.replace('-', '_')}").TARGETS]


def target(name: str) -> tuple[ModuleType, str]:
    """A target string, "format:target" or "format" where a format has only one, -> its module and the target's name there.

    Raises:
        FormatError: a format or a target that does not exist; names the nearest.

    >>> module, kind = target("gguf:q4_0")
    >>> kind, module.TARGETS[kind].grid
    ('q4_0', Uniform(bits=4, signed=True, narrow=False))
    """
    form, _, kind = name.partition(":")
    if form.replace("_", "-") not in formats():
        meant = [known for known in targets() if not kind and known.partition(":")[2] == form.lower().replace("-", "_")]
        raise FormatError(f"there is no export format {form!r}; did you mean {' or '.join(meant)}?" if meant else
                          unknown("export format", form, formats()) + "; a target reads format:kind, for instance gguf:q4_0")
    module = importlib.import_module(f"{__name__}.{form.replace('-', '_')}")
    if not kind and len(module.TARGETS) == 1:
        kind = next(iter(module.TARGETS))
    if kind not in module.TARGETS:
        raise FormatError(unknown("target", name, [f"{form}:{known}" for known in module.TARGETS]))
    return module, kind


def readable() -> dict[str, ModuleType]:
    """The formats whose artefacts training can start from.

    >>> "gguf" in readable(), "onnx" in readable()
    (True, False)
    """
    found = {form: importlib.import_module(f"{__name__}.{form.replace('-', '_')}") for form in formats()}
    return {form: module for form, module in found.items() if hasattr(module, "qtensors")}


def holder(path: str | Path) -> str | None:
    """The format of an artefact that training can start from, or None: each format is asked."""
    return next((form for form, module in readable().items() if module.holds(path)), None)


def place(folder: Path, name: str) -> Path:
    """The artefact of a target in the folder of a run's exports.

    >>> place(Path("exports"), "gguf:q4_0").as_posix(), place(Path("exports"), "compressed-tensors:w4a16").as_posix()
    ('exports/gguf-q4_0/model.gguf', 'exports/compressed-tensors-w4a16')
    """
    module, kind = target(name)
    home = folder / f"{name.partition(':')[0]}-{kind}"
    return home / f"model.{module.SUFFIX}" if module.SUFFIX else home


def named(folder: str) -> str | None:
    """The target whose artefacts lie in a folder of that name, or None.

    >>> named("gguf-q4_0"), named("compressed-tensors-w4a16"), named("notes")
    ('gguf:q4_0', 'compressed-tensors:w4a16', None)
    """
    return next((name for name in targets() if name.replace(":", "-", 1) == folder), None)


def files(artefact: Path) -> list[Path]:
    """The files of an artefact, itself or what the directory holds."""
    return sorted(path for path in artefact.rglob("*") if path.is_file()) if artefact.is_dir() else [artefact]
