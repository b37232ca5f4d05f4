"""The safetensors files of a directory, by their headers: what readers of other people's checkpoints share.

Nothing is believed: JSON may be anything, names of shards must be files of this directory, and shapes are known from the headers, which safetensors
holds against the length of the file, before any tensor is asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..core.error import SAID, FormatError

INDEX = "model.safetensors.index.json"


def read_json(file: Path) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        FormatError: no such file, or it holds something else.
    """
    if not file.is_file():                                        # nor is a pipe, at which a reader would wait, or a device without an end
        raise FormatError(f"{file.parent} has no file {file.name}")
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise FormatError(f"{file} cannot be read ({str(error)[:SAID]}); copy or write it anew") from None
    if not isinstance(said, dict):
        raise FormatError(f"{file} holds a {type(said).__name__}, and should hold an object; copy or write it anew")
    return said


def quantization(path: str | Path, method: str, old: str) -> dict[str, Any]:
    """`quantization_config` of config.json, of a quantization by `method`; or the whole file `old`, where it stood before config.json had a place.

    Raises:
        FormatError: no such directory, a config.json that cannot be read, or another method.
    """
    path = Path(path)
    if not path.is_dir():
        raise FormatError(f"there is no {method} directory {path}")
    file = path / "config.json"
    found = read_json(file).get("quantization_config") if os.path.lexists(file) else None         # a pipe or a loop is there, and refused
    if not isinstance(found, dict) and (path / old).is_file():
        file = path / old
        found = {"quant_method": method} | read_json(file)
    by = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(found, dict) or by != method:
        raise FormatError(f"{file} describes no {method} model, its quantization is by {by!r}")
    return found


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
        if not isinstance(named, dict) or not named:
            raise FormatError(f"{path / INDEX} has no weight_map from tensors to files of this directory")
        if wrong := [name for name in named.values() if not isinstance(name, str) or Path(name).name != name]:
            raise FormatError(f"{path / INDEX} names {wrong[0]!r}, which is no file of this directory")
        found = [path / name for name in sorted(set(named.values()))]
        if gone := [file.name for file in found if not file.is_file()]:
            raise FormatError(f"{path} lacks {', '.join(gone)}, which its index names; the copy is not complete")
        return found
    found = [path / "model.safetensors"] if (path / "model.safetensors").is_file() else sorted(filter(Path.is_file, path.glob("*.safetensors")))
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
            raise FormatError(f"{file} is no whole safetensors file, truncated or of another kind: {str(error)[:SAID]}") from None
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
            raise FormatError(f"{file} cannot be read: {str(error)[:SAID]!r}; write it anew") from None
