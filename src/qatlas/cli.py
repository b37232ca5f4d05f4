"""The command line: what people type. Each command reads its flags from the signature of a function, calls it, and prints; errors for people end
with code 2.

    qatlas demo                                      the main job on the model that ships with the package, in a few minutes
    qatlas run lsq --model DIR --data FILE --bits 4 --target gguf:q4_0 --out DIR
    qatlas run lsq --plan                            what that would do: coverage, refusals, memory, time
    qatlas list | show PAPER                         the shelf
    qatlas eval | generate | export | verify | report DIR
    qatlas doctor                                    what this machine has

Every command takes --config file.yaml and prints one with --print_config; so a run is a file, if you like.
"""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import table
from .core.error import CheckpointError, DataError, FormatError, QatlasError, RunError, unknown
from .flags import Parser, essay, first_line, many, run_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0 well, 1 a proof that failed, 2 something to mend, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return command(argv)
    except SystemExit as stop:                                    # the parser's: help was shown, or a flag is wrong
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except QatlasError as error:
        sys.stderr.write(f"qatlas: {type(error).__name__}: {error}\n")
        return 2
    except PermissionError as error:
        sys.stderr.write(f"qatlas: {error.filename or ''}: no right to read or write there\n")
        return 2
    except BrokenPipeError:                                       # `qatlas show lsq | head`: the reader has seen enough
        sys.stdout = None  # type: ignore[assignment]
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("\nqatlas: interrupted; a run with --out goes on with --resume\n")
        return 130


def command(argv: list[str]) -> int:
    """Find the command and run it."""
    if not argv or argv[0] in ("-h", "--help"):
        print("Quantization-aware training: each published method one readable file, on anyone's model, exported bit for bit.\n")
        print(__doc__.partition("\n\n")[2])
        print("commands:\n" + "\n".join(f"  {name:9} {first_line(function)}" for name, function in COMMANDS.items()))
        print("\n  qatlas COMMAND --help teaches the rest")
        return 0
    if argv[0] in ("-V", "--version"):
        from .record import versions

        print(versions().get("qatlas", "a source tree, not installed"))
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise QatlasError(unknown("command", name, COMMANDS))
    if name == "run":
        return _run(rest)
    function = COMMANDS[name]
    parser = Parser(prog=f"qatlas {name}", description=essay(function))
    parser.add_argument("--config", action="config", help="a YAML file of these flags")
    several = many(parser, function)
    parser.add_function_arguments(function, as_positional=not several)
    given = parser.bare().parse_args(rest)
    given.pop("config", None)
    return function(*(given.pop(several) if several else ()), **vars(given))


def _run(argv: list[str]) -> int:
    """Run a paper on a model: train, pack, export, read back, report. qatlas run PAPER --help shows its flags."""
    from dataclasses import fields

    from . import papers

    if not argv or argv[0].startswith("-"):
        print(f"usage: qatlas run PAPER [flags]\npapers: {', '.join(papers.names())}\n"
              "  qatlas run PAPER --help shows its flags; qatlas show PAPER its essay")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    from .job import plan, run
    from .prepare import Job

    parser = run_parser(argv[0])                                  # an unknown paper is refused here, with the nearest
    given = vars(parser.parse_args(argv[1:]))
    given.pop("config", None)
    job = Job(**{field.name: given.pop(field.name) for field in fields(Job)})
    quiet()
    if job.data == Job.data and not job.model.startswith("zoo:"):
        _say(f"data: {job.data}, Python's documentation, which ships with qatlas; give --data FILE or a hub id to train on your own")
    if job.plan:
        table.plan(plan(argv[0], given, job))
        return 0
    outcome = run(argv[0], given, job, command=shlex.join(["qatlas", "run", *argv]), say=_say)
    table.scores(outcome.record)
    table.proofs(outcome.record.proofs)
    if outcome.out is None:
        print("nothing was kept: give --out DIR to keep the model, the exports and the report")
    else:
        print(f"{outcome.out}: the model, exports, record.json and report.html")
    return _code(outcome.record.proofs)


def demo(out: str = "demo", steps: int | None = None, seed: int = 0, threads: int = 0, resume: bool = False) -> int:
    """The main job on the model that ships with the package: ternary weights, 8-bit activations, exported to llama.cpp and read back.

    Args:
        out: the directory for all that it makes.
        steps: optimizer steps; by default so many that two cores need less than five minutes.
        seed: of the data order.
        threads: threads of torch; 0 leaves them as they are.
        resume: go on where a demo was stopped.
    """
    from .demo import demo as play

    quiet()
    outcome = play(out, steps=steps, seed=seed, threads=threads, resume=resume, say=_say)
    table.scores(outcome.record)
    table.proofs(outcome.record.proofs)
    for stage, text in outcome.record.samples.items():
        print(f"\n{stage}: {text}")
    print(f"\n{out}/report.html shows all of it; {out}/exports/gguf-tq2_0/model.gguf runs in llama.cpp; "
          f"AutoModelForCausalLM.from_pretrained({out!r}) loads it after `import qatlas`")
    return _code(outcome.record.proofs)


def list_papers() -> int:
    """List the shelf."""
    from . import papers

    table.pairs({name: first_line(papers.module(name)) for name in papers.names()})
    return 0


def show(paper: str) -> int:
    """Show a paper's essay and its flags.

    Args:
        paper: its name, see `qatlas list`.
    """
    from . import papers

    print(inspect.getdoc(papers.module(paper)))
    print()
    run_parser(paper).print_help()
    return 0


def evaluate(*directory: str, data: str | None = None, length: int | None = None, batch: int = 8, tasks: str | None = None,
             task_path: str | None = None, limit: int | None = None, shots: int | None = None) -> int:
    """Judge saved models: on held-out data, or on benchmarks.

    Held-out data, by default what the run was trained on:

        qatlas eval DIR
        qatlas eval DIR --data FILE

    Benchmarks, asked by lm-eval (pip install 'qatlas[eval]') of the packed model as it is; the scores are printed side by side and kept in eval.json
    of each directory:

        qatlas eval DIR --tasks lambada_openai,piqa            tasks of lm-eval's list, data from the Hub
        qatlas eval DIR OTHER --tasks animals --task_path TASKS    tasks of your own: YAML files in the folder TASKS, data beside them

    Args:
        directory: of a run, or of any transformers model; several are judged one after the other.
        data: a hub id, a file, or builtin:docs; by default what the run was trained on.
        length: tokens of a window; by default those of the run, else 256.
        batch: rows of a forward.
        tasks: benchmarks by name, with commas between them.
        task_path: a folder with benchmarks as YAML files; then only those are known.
        limit: documents of each benchmark, for a quick look.
        shots: examples before each question; by default what the benchmark says.
    """
    quiet()
    if tasks:
        return _benchmark(list(directory), [task.strip() for task in tasks.split(",") if task.strip()], task_path, limit, shots, batch)
    if wrong := [name for name, value in (("task_path", task_path), ("limit", limit), ("shots", shots)) if value is not None]:
        raise DataError(f"--{wrong[0]} is of benchmarks; say which: --tasks NAME,NAME")
    for each in directory:
        found = _judged(each, data, length, batch)
        print(each) if len(directory) > 1 else None
        table.pairs(found)
    return 0


def _judged(directory: str, data: str | None, length: int | None, batch: int) -> dict[str, float]:
    from .prepare import Job, prepare
    from .record import Record
    from .train.evaluate import evaluate as judge
    from .train.run import Run

    if data is None and not (Path(directory) / "record.json").is_file():
        raise DataError(f"{directory} holds no record.json that says what it was trained on; say what to judge it on: --data FILE, a hub id, "
                        "or builtin:docs")
    ran = Record.read(directory) if (Path(directory) / "record.json").is_file() else None
    settings = {"task": "auto", "length": 256, **{key: ran.job[key] for key in ("task", "length") if ran and key in ran.job}}
    if length is not None:
        settings["length"] = length
    job = Job(model=directory, data=ran.data if ran is not None and data is None else str(data), batch=batch, **settings)
    model, _, task = prepare(job, Run(None, progress=False))
    return dict(judge(model, task))


def _benchmark(directories: list[str], tasks: list[str], task_path: str | None, limit: int | None, shots: int | None, batch: int) -> int:
    from .model.load import load
    from .train.benchmark import benchmark, keep, lacks

    if lacks():
        raise RunError(str(lacks()))
    scores = {}
    for each in directories:
        model, tokenizer = load(each)
        scores[each] = benchmark(model, tokenizer, tasks, task_path=task_path, limit=limit, shots=shots, batch=batch)
        if Path(each).is_dir():
            keep(each, scores[each], limit=limit, shots=shots)
    table.benchmarks(scores)
    return 0


def generate(directory: str, prompt: str = "The with statement", tokens: int = 60) -> int:
    """Continue a prompt with a saved model.

    Args:
        directory: of a run, or of any transformers language model.
        prompt: the text to continue.
        tokens: how many new tokens.
    """
    from .job import generate as speak
    from .model.load import load

    quiet()
    model, tokenizer = load(directory)
    if tokenizer is None or not getattr(model, "can_generate", lambda: False)():
        found = f"{type(model).__name__}{'' if tokenizer else ' without a tokenizer'}"
        raise CheckpointError(f"{directory} holds a {found}; only a language model speaks")
    print(speak(model, tokenizer, prompt, tokens))
    return 0


def export(directory: str, target: str | None = None) -> int:
    """Write a run's packed model in another format, from the trained codes as they are.

    Args:
        directory: of a run.
        target: such as gguf:tq2_0; must be given.
    """
    from .export import targets
    from .keep import add_export

    if target is None:
        raise FormatError(f"say which: --target {', '.join(targets())}")
    quiet()
    print(add_export(Path(directory), target))
    return 0


def verify(directory: str, target: str | None = None) -> int:
    """Read a run's artefacts back through the formats' own readers and compare.

    Args:
        directory: of a run.
        target: one export only, such as gguf:tq2_0; by default all there are.
    """
    from .model.verify import verify as prove
    from .record import Record

    quiet()
    sums = Record.read(directory).sums if (Path(directory) / "record.json").is_file() else None
    found = [vars(proof) for proof in prove(directory, target, sums=sums)]
    table.proofs(found)
    return _code(found)


def report(directory: str, out: str | None = None) -> int:
    """Write a run's one-file HTML report again.

    Args:
        directory: of a run.
        out: the file; by default report.html in the directory.
    """
    from .record import Record
    from .report import report as draw

    print(draw(Record.read(directory), Path(out or Path(directory) / "report.html")))
    return 0


def doctor() -> int:
    """Say what this machine has: versions, chips, extras."""
    from importlib.util import find_spec

    from .export import targets
    from .record import machine, versions

    extras = {module: "there" if find_spec(module) else f"missing: pip install 'qatlas[{extra}]'"
              for module, extra in (("compressed_tensors", "compressed-tensors"), ("torchao", "torchao"), ("xllamacpp", "llamacpp"),
                                    ("onnxruntime", "onnx"), ("openvino", "openvino"), ("executorch", "executorch"),
                                    ("lm_eval", "eval"), ("PIL", "vision"), ("tensorboard", "tensorboard"))}
    table.pairs({**versions(), **machine(), "export targets": ", ".join(targets()), **extras})
    return 0


def quiet() -> None:
    """Silence transformers' bars and warnings, which speak of steps that take no time; its downloads keep their bar."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if sys.stderr.isatty():
        enable_progress_bars()


def _code(proofs: list[dict[str, Any]]) -> int:
    return int(any(proof["passed"] is False for proof in proofs))


def _say(line: str) -> None:
    sys.stderr.write(f"  {line}\n")
    sys.stderr.flush()


COMMANDS: dict[str, Callable[..., int]] = {"demo": demo, "run": _run, "list": list_papers, "show": show, "eval": evaluate, "generate": generate,
                                           "export": export, "verify": verify, "report": report, "doctor": doctor}


if __name__ == "__main__":
    sys.exit(main())
