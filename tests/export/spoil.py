"""Spoilt files: what a broken disk, a torn download or an enemy may put in the place of an artefact. All is drawn from a `random.Random`, so
a number names a file for ever. None of them knows a format; what they know is text, JSON, safetensors headers, and integers near names.

    bytes      bits flipped, truncated, lengthened, zeroed, noise, a piece twice, two names made one
    numbers    a header's integers huge or negative: at the start of the file, and beside the names in it
    JSON       one value another (huge, negative, another kind, nested a hundred thousand deep), a key gone, twice, or of another name
    files      a pickle, nothing, a directory, a pipe, a link to itself or to /dev/zero in the place of a file; a file gone, two exchanged
    shards     an index that leads out of the directory; a config that names code which lies beside it
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from random import Random
from typing import Any

HUGE = (2**63 - 1, 2**64 - 1, 2**63, 2**62, 2**48, 2**40, 2**33, 2**32, 2**31, 2**32 - 1, 2**31 - 1, 10**6, 255, 1, 0)
STRANGE: tuple[Any, ...] = (-1, -(2**63), 2**63, 2**40, 10**300, 0, 1, 7, 1.5, -0.0, float("nan"), float("inf"), "", "x", "../x", "\ud800", "\0",
                            None, True, [], {}, [[]], [-1], [2**40, 2**40], [0, 0], {"a": 1}, "core.grid:Uniform", {"is": "os:system"},
                            {"is": "core.grid:Uniform", "bits": 40}, "a" * 5000)
DEEP = 100_000
WEIGHTS = "model.safetensors"
CANARY = "touched"
REFUSED = ("pickle", "pipe", "loop", "endless", "traversal", "absolute", "folder")       # what must never be read as if nothing had happened


class Harm:
    """What unpickling would do: make a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return open, (str(self.canary), "w")


def spoil(rng: Random, folder: Path, artefact: Path, canary: Path) -> str:
    """Change one thing in an artefact (a file or a directory) below `folder`; what was done, its first word being the kind."""
    files = sorted(p for p in artefact.rglob("*") if p.is_file()) if artefact.is_dir() else [artefact]
    told = [p for p in files if p.name in (WEIGHTS, "config.json")] if len(files) > 1 else []
    path = rng.choice(told if told and rng.random() < 0.8 else files)
    kinds = [*BYTES] * 2 + [*FILES]
    kinds += ([*TEXT] * 8 if path.suffix == ".json" else []) + ([*HEADER] * 8 if path.suffix == ".safetensors" else [])
    kinds += [*SHARDS] * 2 if artefact.is_dir() and (artefact / WEIGHTS).is_file() else []
    kind = rng.choice(kinds)
    if kind in BYTES:
        raw = bytearray(path.read_bytes())
        raw = BYTES[kind](rng, raw) if raw else raw
        path.write_bytes(bytes(raw))
    elif kind in TEXT:
        path.write_text(TEXT[kind](rng, path.read_text(encoding="utf-8")), encoding="utf-8", errors="surrogatepass")
    elif kind in HEADER:
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        text = TEXT[kind.partition(" ")[2]](rng, raw[8 : 8 + size].decode()).encode(errors="surrogatepass")
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    elif kind in FILES:
        FILES[kind](rng, path, files, canary)
    else:
        SHARDS[kind](rng, folder, artefact, canary)
    return f"{kind}: {path.relative_to(folder)}"


def flips(rng: Random, raw: bytearray) -> bytearray:
    """One to sixteen bits, mostly among the first bytes."""
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        raw[_at(rng, raw)] ^= 1 << rng.randrange(8)
    return raw


def cut(rng: Random, raw: bytearray) -> bytearray:
    """Truncated anywhere."""
    return raw[: rng.choice((rng.randrange(len(raw)), min(len(raw), rng.randrange(64)), len(raw) - 1))]


def longer(rng: Random, raw: bytearray) -> bytearray:
    """Something behind the end."""
    return raw + rng.randbytes(rng.choice((1, 7, 4096)))


def noise(rng: Random, raw: bytearray) -> bytearray:
    """A piece of zeros, ones or noise."""
    at, n = _at(rng, raw), rng.choice((1, 4, 8, 64, 1024))
    raw[at : at + n] = rng.choice((bytes(n), b"\xff" * n, rng.randbytes(n)))[: len(raw) - at]
    return raw


def twice(rng: Random, raw: bytearray) -> bytearray:
    """A piece copied to another place, over what is there or between."""
    at, to, n = _at(rng, raw), _at(rng, raw), rng.choice((8, 32, 256))
    raw[to : to + rng.choice((0, n))] = raw[at : at + n]
    return raw


def number(rng: Random, raw: bytearray) -> bytearray:
    """A huge or a negative integer at the start, or before or behind a name."""
    found = [m.span() for m in re.finditer(rb"[A-Za-z][\w.]{4,}", bytes(raw[:65536]))]
    start = rng.choice((0, 4, 8, 12, 16, 20, 24))
    if found and rng.random() < 0.8:
        low, high = rng.choice(found)
        start = rng.choice((low - 8, low - 4, low - 12, high, high + 4, high + 8, high + 12, high + 20))
    size = rng.choice((1, 4, 8, 8))
    value = rng.choice(HUGE) % 2 ** (8 * size)
    start = max(0, start)
    raw[start : start + size] = value.to_bytes(size, "little")
    return raw


def namesake(rng: Random, raw: bytearray) -> bytearray:
    """Two names of one length made one."""
    found = [m.span() for m in re.finditer(rb"[A-Za-z][\w.]{4,}", bytes(raw[:65536]))]
    found = found[:200]
    pairs = [(a, b) for a in found for b in found if a[1] - a[0] == b[1] - b[0] and raw[slice(*a)] != raw[slice(*b)]]
    if not pairs:
        return flips(rng, raw)
    a, b = rng.choice(pairs)
    raw[slice(*a)] = raw[slice(*b)]
    return raw


def _at(rng: Random, raw: bytearray) -> int:
    return rng.randrange(min(len(raw), rng.choice((16, 256, 4096, 65536, len(raw)))))


def strange(rng: Random, text: str) -> str:
    """One value another."""
    def change(home: Any, key: Any) -> None:
        home[key] = rng.choice(STRANGE)
    return _changed(rng, text, change)


def gone(rng: Random, text: str) -> str:
    """One key or item less."""
    def change(home: Any, key: Any) -> None:
        del home[key]
    return _changed(rng, text, change)


def renamed(rng: Random, text: str) -> str:
    """A value under another key; in a list twice."""
    def change(home: Any, key: Any) -> None:
        home.append(home[key]) if isinstance(home, list) else home.__setitem__(f"{key}x", home.pop(key))
    return _changed(rng, text, change)


def double(rng: Random, text: str) -> str:
    """A key twice, with two values."""
    names: list[str] = []

    def change(home: Any, key: Any) -> None:
        if isinstance(home, dict):
            names.append(json.dumps(key))
            home["\x01twin"] = rng.choice(STRANGE[:20])
    return _changed(rng, text, change).replace('"\\u0001twin"', names[0] if names else '"twin"')


def deep(rng: Random, text: str) -> str:
    """A value nested a hundred thousand deep."""
    def change(home: Any, key: Any) -> None:
        home[key] = "\x01deep"
    opened, closed = rng.choice((("[", "]"), ('{"a":', "}")))
    end = rng.choice((closed, ""))
    return _changed(rng, text, change).replace('"\\u0001deep"', opened * DEEP + "1" + end * DEEP)


def _changed(rng: Random, text: str, change: Any) -> str:
    """The JSON text after `change` at one place of it; where nearly all is one kind of thing, the others come up as often."""
    data = json.loads(text)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any, depth: int) -> None:
        keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        for key in keys if len(keys) < 200 else rng.sample(keys, 200):
            places.append((node, key))
            walk(node[key], depth + 1)
    walk(data, 0)
    if not places:
        return text + "x"
    change(*rng.choice(places))
    return json.dumps(data)


def _pickle(rng: Random, path: Path, files: list[Path], canary: Path) -> None:
    path.write_bytes(pickle.dumps(Harm(canary), protocol=rng.choice((0, 2, 4))))


def _other(made: Any) -> Any:
    def instead(rng: Random, path: Path, files: list[Path], canary: Path) -> None:
        path.unlink()
        made(path)
    return instead


def _exchanged(rng: Random, path: Path, files: list[Path], canary: Path) -> None:
    shutil.copyfile(rng.choice(files), aside := path.with_name(".aside"))
    os.replace(aside, path)


def _traversal(rng: Random, folder: Path, artefact: Path, canary: Path) -> None:
    _outside(folder, artefact, os.path.relpath(folder, artefact) + "/../outside.safetensors")


def _absolute(rng: Random, folder: Path, artefact: Path, canary: Path) -> None:
    _outside(folder, artefact, str(folder.parent.resolve() / "outside.safetensors"))


def _outside(folder: Path, artefact: Path, name: str) -> None:
    """The weights outside of the directory, and an index that leads there."""
    os.replace(artefact / WEIGHTS, folder.parent / "outside.safetensors")
    raw = (folder.parent / "outside.safetensors").read_bytes()
    names = [key for key in json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]) if key != "__metadata__"]
    index = {"metadata": {"total_size": len(raw)}, "weight_map": dict.fromkeys(names, name)}
    (artefact / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def _index(rng: Random, folder: Path, artefact: Path, canary: Path) -> None:
    """An index that is none."""
    os.replace(artefact / WEIGHTS, artefact / "model-00001-of-00001.safetensors")
    said = rng.choice(({}, [], {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 7}}, {"weight_map": {"a": "b.safetensors"}},
                       {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}, {"metadata": None, "weight_map": {"a": ""}}, None))
    (artefact / f"{WEIGHTS}.index.json").write_text(json.dumps(said) if rng.random() < 0.8 else "{")


def _code(rng: Random, folder: Path, artefact: Path, canary: Path) -> None:
    """Code beside the weights that config.json asks for."""
    (artefact / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((artefact / "config.json").read_text())
    config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")
    config |= {"model_type": "evil"} if rng.random() < 0.5 else {}
    config |= {"architectures": ["Evil"]} if rng.random() < 0.5 else {}
    (artefact / "config.json").write_text(json.dumps(config))


BYTES = {"flips": flips, "cut": cut, "longer": longer, "noise": noise, "twice": twice, "number": number, "namesake": namesake}
TEXT = {"strange": strange, "gone": gone, "renamed": renamed, "double": double, "deep": deep}
HEADER = {f"header {name}": function for name, function in TEXT.items()}
FILES = {"pickle": _pickle, "empty": _other(Path.touch), "folder": _other(Path.mkdir), "pipe": _other(os.mkfifo),
         "missing": _other(lambda path: None), "loop": _other(lambda path: path.symlink_to(path.name)),
         "endless": _other(lambda path: path.symlink_to("/dev/zero")),
         "exchanged": _exchanged}
SHARDS = {"traversal": _traversal, "absolute": _absolute, "index": _index, "code": _code}
