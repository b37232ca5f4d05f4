"""Artefacts that are a directory as Hugging Face keeps one: config.json, safetensors, the tokenizer's files. What their writers and readers share.

Writing. The class that the config names is built empty (without memory for weights), which is what a reader does: so a name that it does not know, a
tensor that is missing and a layer of another class are refused here and not met there. The directory appears whole or not at all, and never replaces
another.

Reading. Nothing is believed: JSON may be anything, names of shards must be files of this directory, and shapes are known from the headers, which
safetensors holds against the length of the file, before any tensor is asked for.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.error import FormatError
from .checkpoint import TOKENIZER, Checkpoint

INDEX = "model.safetensors.index.json"


def skeleton(config: dict[str, Any], form: str) -> dict[str, nn.Module]:
    """Name -> module of the model that a reader will build, without memory for its weights. form: the format's name, for the error.

    Raises:
        FormatError: a config that names no class of transformers.
    """
    import transformers

    kind, names = str(config.get("model_type")), config.get("architectures") or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None or kind not in transformers.CONFIG_MAPPING:
        raise FormatError(f"{form} holds models that transformers can build, and knows no {names[0] if names else 'class'} of type {kind!r}")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with torch.device("meta"):
        return dict(cls(transformers.CONFIG_MAPPING[kind].from_dict(plain)).named_modules())


def check_names(modules: dict[str, nn.Module], checkpoint: Checkpoint) -> None:
    """Refuse tensors that are not those of the model: of those that are tied one is enough, and before training buffers are not asked for."""
    ties = getattr(modules[""], "all_tied_weights_keys", None) or {}
    state, have = modules[""].state_dict(), set(checkpoint.tensors)
    twins = {a: {b for pair in ties.items() for b in pair if a in pair} for a in state}
    missing = sorted(name for name, _ in modules[""].named_parameters() if name not in have and not twins[name] & have)
    extra = sorted(have - set(state))
    wrong = sorted(name for name in have & set(state) if not _fits(name, checkpoint.tensors[name], modules, state[name]))
    if missing or extra or wrong:
        raise FormatError(f"the tensors are not those of {type(modules['']).__name__}: missing {', '.join(missing[:4]) or 'none'}; "
                          f"unknown {', '.join(extra[:4]) or 'none'}; of another shape {', '.join(wrong[:4]) or 'none'}")


def _fits(name: str, tensor: Any, modules: dict[str, nn.Module], own: Tensor) -> bool:
    """A QTensor lies (out, in), also where the module's weight lies (in, out), as that of Conv1D does."""
    layer = modules.get(name.removesuffix(".weight"))
    turned = type(layer).__name__ == "Conv1D" and name.endswith(".weight") and not isinstance(tensor, Tensor)
    return tuple(tensor.shape) == tuple(own.T.shape if turned else own.shape)


def free(path: str | Path) -> Path:
    """The path, if a directory may be made there.

    Raises:
        FormatError: something is in the way; an empty directory is not.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FormatError(f"{path} exists; remove it or choose another name")
    return path


def make(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, Any], checkpoint: Checkpoint) -> Path:
    """The directory: model.safetensors, `texts` (file name -> what becomes its JSON), and the tokenizer's files.

    Raises:
        FormatError: something came in the way. Then nothing is left behind.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        save_file(dict(tensors), aside / "model.safetensors", metadata={"format": "pt"})
        for name, said in texts.items():
            (aside / name).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in (checkpoint.tokenizer / name for name in (*TOKENIZER, "generation_config.json")) if checkpoint.tokenizer else ():
            if file.is_file():
                shutil.copyfile(file, aside / file.name)
        for file in aside.iterdir():
            with file.open("rb+") as written:
                os.fsync(written.fileno())
        os.rename(aside, path)                                    # fails where a directory with anything in it is in the way
    except OSError as error:
        if path.exists():
            raise FormatError(f"{path} exists; remove it or choose another name") from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def narrow(steps: Tensor, dtype: str) -> Tensor:
    """The steps in the type that they were trained in, where that is one of the reader's and loses nothing; else in fp32."""
    small = steps.to(getattr(torch, dtype)) if dtype in ("bfloat16", "float16") else steps.float()
    return small if torch.equal(small.to(steps.dtype), steps) else steps.float()


def plain(tensor: Tensor) -> Tensor:
    """A tensor in full precision, in the smallest type that holds every value."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype not in (torch.float32, torch.float64):
        return tensor.clone()
    small = narrow(tensor, "bfloat16")
    return small if small.dtype == torch.bfloat16 else narrow(tensor, "float16").clone()


def read_json(file: Path) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        FormatError: no such file, or it holds something else.
    """
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{file.parent} has no {file.name}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise FormatError(f"{file} cannot be read ({error}); copy or write it anew") from None
    if not isinstance(said, dict):
        raise FormatError(f"{file} holds a {type(said).__name__}, and should hold an object; copy or write it anew")
    return said


class Stored(NamedTuple):
    """A tensor of a file, by its header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str                                                    # as safetensors calls it: F16, I32, ...


def shards(path: str | Path) -> list[Path]:
    """The safetensors files of a directory: those that the index names, else model.safetensors, else all.

    Raises:
        FormatError: no such directory, none of them, one that is missing or lies elsewhere, or pickles in their place.
    """
    path = Path(path)
    if not path.is_dir():
        raise FormatError(f"there is no directory {path}")
    if (path / INDEX).is_file():
        named = read_json(path / INDEX).get("weight_map")
        if not isinstance(named, dict) or not named or not all(isinstance(name, str) and Path(name).name == name for name in named.values()):
            raise FormatError(f"{path / INDEX} has no weight_map from tensors to files of this directory")
        found = [path / name for name in sorted(set(named.values()))]
        if gone := [file.name for file in found if not file.is_file()]:
            raise FormatError(f"{path} lacks {', '.join(gone)}, which its index names; the copy is not complete")
        return found
    found = [path / "model.safetensors"] if (path / "model.safetensors").is_file() else sorted(path.glob("*.safetensors"))
    if not found:
        pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in path.glob(kind))
        raise FormatError(f"{path} has no model.safetensors" + (f", only {', '.join(pickles[:3])}: pickle files are never opened; convert them to "
                                                               "safetensors where they were made" if pickles else "; the copy is not complete"))
    return found


def headers(path: str | Path) -> dict[str, Stored]:
    """Name -> shape and type of all tensors of a directory; none is read yet.

    Raises:
        FormatError: as `shards`; a file that is truncated or no safetensors; a tensor that lies in two of them.
    """
    from safetensors import SafetensorError, safe_open

    out: dict[str, Stored] = {}
    for file in shards(path):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118        # it is no dict
                    if name in out:
                        raise FormatError(f"{name} lies in {out[name].file.name} and in {file.name}; which of them is meant?")
                    part = opened.get_slice(name)
                    out[name] = Stored(file, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(f"{file} is no whole safetensors file: {error}. It is truncated or of another kind; write it anew") from None
    return out


def tensors(found: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of some headers, one after the other, file by file.

    Raises:
        FormatError: a file that changed since, or a type that torch has not.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted({stored.file for stored in found.values()}):
        try:
            with safe_open(file, "pt") as opened:
                for name in (name for name, stored in found.items() if stored.file == file):
                    yield name, opened.get_tensor(name)
        except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
            raise FormatError(f"{file} cannot be read: {error!r}; write it anew") from None
