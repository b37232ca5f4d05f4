"""A child process that reads spoilt files, one after the other, and says what came of each: python fuzz.py FOLDER FIRST LAST SEED SOME|ALL.

It prints a line of JSON for each file: {"n", "of", "how", "outcome"}: read, refused (a QatlasError), or wrong with what happened. Its memory is
bounded by the kernel (ROOM beyond what it has when all whole artefacts have been read once), its time by a watchdog that ends it with a traceback
(SECONDS for one reader of one file, generous, since machines are busy). An error that comes from a refused
allocation counts as wrong: whoever reads a file looks before it asks for memory.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

ROOM = 2**30                                                      # bytes that one file may cost
SECONDS = int(os.environ.get("QATLAS_FUZZ_SECONDS", "60"))
WATCHED = ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pty.spawn")
SINGLE = (".gguf", ".onnx")                                       # artefacts of one file; others are directories
SMALL = {"num_hidden_layers": 1}
READERS = ("holds", "read", "qtensors", "types", "unused")        # of a format: path ->
APART = ("executorch",)                                           # asked in a child with bounded memory and time, seconds a file, and absent
                                                                  # where the tests run; tests/export/executorch spoils some
SLOW = ("model", "logits", "answers")                             # transformers or onnxruntime run the file: asked of some


class Artefact:
    """What is spoilt: a run's directory `home` with something in it at `at`, and how it is read."""

    def __init__(self, name: str, home: Path, at: str, form: Any = None, target: str = "") -> None:
        self.name, self.home, self.at, self.form, self.target = name, home, at, form, target

    def readers(self, folder: Path, slow: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Name -> call, of all that reads it in a copy of the home."""
        from qatlas.model.load import load
        from qatlas.model.verify import verify
        from qatlas.record import Record

        path = folder / self.at
        if self.form is None:
            yield from [("record", lambda: Record.read(path.parent))] if path.name == "record.json" else [("load", lambda: load(path))]
            return
        missing = hasattr(self.form, "lacks") and self.form.lacks()           # the package that reads it; what we read ourselves stays
        for name in ("holds", "qtensors") if missing else READERS:
            if hasattr(self.form, name):
                yield name, lambda name=name: getattr(self.form, name)(path)
        if slow and not missing:
            for name in SLOW:
                if hasattr(self.form, name):
                    yield name, lambda name=name: getattr(self.form, name)(*([path] if name == "model" else [path, asked(name)]))
            yield "verify", lambda: verify(folder, self.target)


def asked(name: str) -> Any:
    """A short prompt, as the reader wants it."""
    import torch

    return [[1, 2, 3]] if name == "logits" else [torch.tensor([[1, 2, 3]])]


def artefacts(folder: Path, every: bool) -> list[Artefact]:
    """A packed and a trainable directory, a record, and for each format, found by listing, one artefact of its first target that holds a small Llama
    (or of every target)."""
    from qatlas.export import formats, targets
    from qatlas.export import target as find_target

    found: list[Artefact] = []
    for form in sorted({*formats()} - {*APART}):
        done = 0
        for target in (name for name in targets() if name.partition(":")[0] == form):
            module, kind = find_target(target)
            if (not done or every) and (made := artefact(folder, target, module, kind)):
                found.append(made)
                done += 1
        assert done, f"no artefact of the format {form} could be made"
    return [*plain(folder), *found]


def plain(folder: Path) -> list[Artefact]:
    """The packed directory, one in training, and a record."""
    from qatlas.model.pack import pack, save
    from qatlas.model.rules import quantize
    from qatlas.record import Record

    if not (folder / "record").exists():
        model, source = small(folder, 64)
        quantize(model, "w4-g32")
        model.save_pretrained(folder / "trainable" / "model")
        save(pack(model), folder / "packed" / "model", source)
        (folder / "record").mkdir()
        Record("lsq", {"bits": 4}, "qatlas run lsq", scores={"packed": {"perplexity": 2.0}}, history=[{"loss": [1.0]}]).write(folder / "record")
    return [Artefact("packed", folder / "packed", "model"), Artefact("trainable", folder / "trainable", "model"),
            Artefact("record", folder / "record", "record.json")]


def artefact(folder: Path, target: str, module: Any, kind: str) -> Artefact | None:
    """A run's directory with an export of this target, or None where no small Llama of ours fits."""
    from qatlas.core.error import QatlasError
    from qatlas.core.grain import PerToken
    from qatlas.core.grid import Uniform
    from qatlas.core.quantizer import Quant
    from qatlas.core.scale import AbsMax
    from qatlas.export import place
    from qatlas.keep import export
    from qatlas.model.pack import pack, save
    from qatlas.model.rules import Rule, keep_full, quantize

    own, home = module.TARGETS[kind], folder / target.replace(":", "-")
    if (path := place(home / "exports", target)).exists():        # of the child before this one
        return Artefact(target, home, path.relative_to(home).as_posix(), module, target)
    for width, entry in itertools.product((64, 256), (None, Quant(Uniform(8), PerToken(), AbsMax()))):
        model, source = small(folder, width)
        try:
            if own is None:
                quantize(model, "w4-g32", target=target)
            else:
                quantize(model, [*keep_full("@embedding", "@head"), Rule("*", weight=own, input=entry)], target=target)
            save(pack(model), home, source)
            path = export(home, target)
        except QatlasError:
            shutil.rmtree(home, ignore_errors=True)
            continue
        return Artefact(target, home, path.relative_to(home).as_posix(), module, target)
    return None


def small(folder: Path, width: int) -> tuple[Any, Path]:
    from small import write_llama

    from qatlas.model.load import load

    source = folder / f"llama-{width}"
    if not source.exists():
        write_llama(source, width, **SMALL)
    return load(source)[0], source


def judge(call: Callable[[], Any]) -> str:
    """read, refused, or wrong: and what."""
    from qatlas.core.error import QatlasError

    try:
        call()
        return "read"
    except QatlasError as error:
        if not str(error).strip() or "Traceback" in str(error) or len(str(error)) > 3000:
            return f"wrong: no clear error: {str(error)[:200]!r}"
        link: BaseException | None = error
        while link is not None:
            if isinstance(link, MemoryError) or "allocate" in str(link) or "bad_alloc" in str(link):
                return f"wrong: memory was asked for: {link!r:.300}"
            link = link.__cause__ or link.__context__
        return "refused"
    except BaseException as error:
        import traceback

        where = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)][-4:]
        return f"wrong: {type(error).__name__}: {str(error)[:200]} at {' > '.join(where)}"


def watch(seen: list[str]) -> None:
    """Note what no reader may do."""
    def hook(event: str, args: Any) -> None:
        if event in WATCHED and not (event == "subprocess.Popen" and "qatlas" in str(args[1])):         # an engine is asked in a process of its own
            seen.append(f"{event} {args!r:.200}")
    sys.addaudithook(hook)


def campaign(folder: Path, count: int, seed: int, every: bool = False, say: Callable[[dict[str, Any]], None] = lambda told: None) -> dict[str, Any]:
    """Read `count` spoilt files in child processes: {"artefacts", "outcomes": of which -> how it came out -> how many, "wrong": [...]}."""
    outcomes: dict[str, Counter[str]] = {}
    out: dict[str, Any] = {"artefacts": [], "outcomes": outcomes, "wrong": []}
    home = Path(__file__).resolve().parent
    path = os.pathsep.join([str(home), str(home.parent), *(part for part in sys.path if part)])
    n, silent = 0, 20 * SECONDS
    while n < count:
        child = subprocess.Popen([sys.executable, __file__, str(folder), str(n), str(count), str(seed), "ALL" if every else "SOME"], text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
        dog = threading.Timer(silent, child.kill)                 # should the child's own watchdog be asleep
        dog.start()
        errors: list[str] = []
        drain = threading.Thread(target=lambda child=child, errors=errors: errors.extend(child.stderr))
        drain.start()
        last: dict[str, Any] = {}
        for line in child.stdout:
            dog.cancel()
            dog = threading.Timer(8 * SECONDS, child.kill)
            dog.start()
            last = json.loads(line)
            if "artefacts" in last:
                out["artefacts"] = last["artefacts"]
            elif "n" in last:
                n = last["n"] + 1
                kind = last["outcome"] if isinstance(last["outcome"], str) else "wrong"
                outcomes.setdefault(last["of"], Counter())[kind] += 1
                if kind == "wrong":
                    out["wrong"].append(last)
                say(last)
        code = child.wait()
        dog.cancel()
        drain.join()
        if code or n < count:
            told = "".join(errors)[-3000:]
            if "begin" not in last:
                raise RuntimeError(f"the child ended with {code} before its first file: {told}")
            out["wrong"].append({"n": last["begin"], "of": last["of"], "how": last["how"], "outcome": [f"ended with {code}: {told}"]})
            outcomes.setdefault(last["of"], Counter())["wrong"] += 1
            say(out["wrong"][-1])
            n = last["begin"] + 1
    return out


def main(folder: Path, first: int, last: int, seed: int, every: bool) -> None:
    import spoil
    import torch

    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    told = os.fdopen(os.dup(1), "w", buffering=1)                 # what libraries print goes elsewhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    folder.mkdir(parents=True, exist_ok=True)
    found, seen, canary = artefacts(folder / "whole", every), [], folder / spoil.CANARY
    warm: set[Any] = set()
    for made in found:
        slow = made.form not in warm
        warm.add(made.form)
        for name, call in made.readers(made.home, slow):
            assert (outcome := judge(call)) == "read", f"the whole {made.name} by {name}: {outcome}"
    told.write(json.dumps({"artefacts": [made.name for made in found]}) + "\n")
    watch(seen)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    for n in range(first, last):
        made, rng, case = found[n % len(found)], Random(f"{seed}:{n}"), folder / "case" / "run"
        shutil.rmtree(case.parent, ignore_errors=True)
        shutil.copytree(made.home, case)
        how = spoil.spoil(rng, case, case / made.at, canary)
        told.write(json.dumps({"begin": n, "of": made.name, "how": how}) + "\n")
        wrong, outcomes = [], []
        for name, call in made.readers(case, n // len(found) % 10 == 0):
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            outcomes.append((name, judge(call)))
            faulthandler.cancel_dump_traceback_later()
        wrong += [f"{name}: {outcome}" for name, outcome in outcomes if outcome.startswith("wrong")]
        if how.startswith(spoil.REFUSED) and all(outcome == "read" for _, outcome in outcomes) and matters(how):
            wrong.append("read as if nothing had happened")
        wrong += [f"did {event}" for event in seen] + (["ran code from the file"] if canary.exists() else [])
        seen.clear()
        canary.unlink(missing_ok=True)
        told.write(json.dumps({"n": n, "of": made.name, "how": how, "outcome": wrong or
                               ("refused" if any(outcome == "refused" for _, outcome in outcomes) else "read")}) + "\n")


def matters(how: str) -> bool:
    """Whether the spoilt file is one that every reader needs."""
    name = Path(how.rpartition(": ")[2]).name
    return name.endswith(SINGLE) or name in ("config.json", "model.safetensors", "record.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "ALL")
