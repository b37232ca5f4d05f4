"""The command line: thin. Each command reads its flags from the signature of a function, calls it, and prints; errors for people end with code 2.

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
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from .core.error import QatlasError, nearest, unknown

SHARED = ("model", "task")                                        # what a paper's function is handed, not told by flags


class Parser(ArgumentParser):
    """An ArgumentParser whose complaints name what comes closest."""

    def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
        flags = re.findall(r"--[\w.-]+", message) if "nrecognized" in message else []
        known = [flag for action in self._actions for flag in action.option_strings]
        for flag in flags:
            close = nearest(flag, known)
            message += f"\n  {flag}: " + (f"did you mean {', '.join(close)}?" if close else f"the flags are {', '.join(known)}")
        sys.stderr.write(f"qatlas: {message}\n  {self.prog} --help shows all flags\n")
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0 well, 1 a proof that failed, 2 something to mend, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return command(argv)
    except QatlasError as error:
        sys.stderr.write(f"qatlas: {type(error).__name__}: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\nqatlas: interrupted; a run with --out goes on with --resume\n")
        return 130


def command(argv: list[str]) -> int:
    """Find the command and run it."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        print("commands:\n" + "\n".join(f"  {name:9} {summary(function)}" for name, function in COMMANDS.items()))
        print("\n  qatlas COMMAND --help teaches the rest")
        return 0
    if argv[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(version("qatlas"))
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise QatlasError(unknown("command", name, COMMANDS))
    if name == "run":
        return _run(rest)
    function = COMMANDS[name]
    parser = Parser(prog=f"qatlas {name}", description=inspect.cleandoc(function.__doc__ or ""), default_meta=False)
    parser.add_argument("--config", action="config", help="a YAML file of these flags")
    parser.add_function_arguments(function, as_positional=True)
    return _call(function, parser, rest)


def _call(function: Callable[..., int], parser: Parser, argv: list[str]) -> int:
    given = parser.parse_args(argv)
    given.pop("config", None)
    return function(**vars(given))


def summary(function: Callable[..., Any]) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(function) or "").split("\n")[0]


def run_parser(paper: str) -> Parser:
    """The parser of one paper: its function's arguments, and what all papers share."""
    from . import papers
    from .job import Job

    function = papers.paper(paper)
    parser = Parser(prog=f"qatlas run {paper}", description=f"{summary(papers.module(paper))} {summary(function)}", default_meta=False)
    parser.add_argument("--config", action="config", help="a YAML file of these flags")
    parser.add_function_arguments(function, skip=set(SHARED), nested_key=None)
    parser.add_class_arguments(Job, nested_key=None)
    return parser


def _run(argv: list[str]) -> int:
    """Run a paper on a model: train, pack, export, read back, report. qatlas run PAPER --help shows its flags."""
    from dataclasses import fields

    from . import papers
    from .job import Job, plan, run

    if not argv or argv[0].startswith("-"):
        print(f"usage: qatlas run PAPER [flags]\npapers: {', '.join(papers.names())}\n  qatlas run PAPER --help shows its flags; qatlas show PAPER its essay")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    parser = run_parser(argv[0])                                  # an unknown paper is refused here, with the nearest
    given = vars(parser.parse_args(argv[1:]))
    given.pop("config", None)
    shared = {field.name: given.pop(field.name) for field in fields(Job)}
    job = Job(**shared)
    if job.plan:
        _print_plan(plan(argv[0], given, job))
        return 0
    outcome = run(argv[0], given, job, command=shlex.join(["qatlas", "run", *argv]), say=_say)
    print_table(outcome.record)
    _print_proofs(outcome.record.proofs)
    if outcome.out is None:
        print("nothing was kept: give --out DIR to keep the model, the exports and the report")
    else:
        print(f"{outcome.out}: the model, exports, record.json and report.html")
    return int(any(proof["passed"] is False for proof in outcome.record.proofs))


def demo(out: str = "demo", steps: int | None = None, seed: int = 0, threads: int = 0) -> int:
    """The main job on the model that ships with the package: ternary weights, 8-bit activations, exported to llama.cpp and read back.

    Args:
        out: the directory for all that it makes.
        steps: optimizer steps; by default so many that two cores need less than five minutes.
        seed: of the data order.
        threads: threads of torch; 0 leaves them as they are.
    """
    from .demo import demo as play

    outcome = play(out, steps=steps, seed=seed, threads=threads, say=_say)
    print_table(outcome.record)
    _print_proofs(outcome.record.proofs)
    for stage, text in outcome.record.samples.items():
        print(f"\n{stage}: {text}")
    print(f"\n{out}/report.html shows all of it; {out}/exports/gguf-tq2_0/model.gguf runs in llama.cpp; "
          f"AutoModelForCausalLM.from_pretrained({out!r}) loads it after `import qatlas`")
    return int(any(proof["passed"] is False for proof in outcome.record.proofs))


def list_papers() -> int:
    """List the shelf."""
    from . import papers

    for name in papers.names():
        print(f"{name:24} {summary(papers.module(name))}")
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


def evaluate(directory: str, data: str | None = None, length: int = 256, batch: int = 8) -> int:
    """Judge a saved model on held-out data.

    Args:
        directory: of a run, or of any transformers model.
        data: a hub id, a file, or builtin:docs; by default what the run was trained on.
        length: tokens of a window.
        batch: rows of a forward.
    """
    from .job import Job, make_task
    from .model.load import load
    from .record import Record
    from .train.evaluate import evaluate as judge
    from .train.run import Run

    if data is None:
        data = Record.read(directory).data
    model, tokenizer = load(directory)
    task = make_task(Job(model=directory, data=data, length=length, batch=batch), model, tokenizer, Run(None, progress=False))
    for name, value in judge(model, task).items():
        print(f"{name:12} {value:.6g}")
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

    model, tokenizer = load(directory)
    if tokenizer is None:
        raise QatlasError(f"{directory} has no tokenizer; a model of images does not speak")
    print(speak(model, tokenizer, prompt, tokens))
    return 0


def export(directory: str, target: str) -> int:
    """Write a run's packed model in another format, from the trained codes as they are.

    Args:
        directory: of a run.
        target: such as gguf:tq2_0.
    """
    from .job import export as write

    print(write(Path(directory), target))
    return 0


def verify(directory: str, target: str | None = None) -> int:
    """Read a run's artefacts back through the formats' own readers and compare.

    Args:
        directory: of a run.
        target: one export only, such as gguf:tq2_0; by default all there are.
    """
    from .model.verify import verify as prove

    proofs = [vars(proof) for proof in prove(directory, target)]
    _print_proofs(proofs)
    return int(any(proof["passed"] is False for proof in proofs))


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
    from .export import formats
    from .record import machine, versions

    for name, value in {**versions(), **machine(), "export formats": ", ".join(formats())}.items():
        print(f"{name:16} {value}")
    from importlib.util import find_spec

    for module, extra in (("xllamacpp", "llamacpp"), ("PIL", "vision"), ("tensorboard", "tensorboard")):
        print(f"{module:16} {'there' if find_spec(module) else f'missing: pip install qatlas[{extra}]'}")
    return 0


def print_table(record: Any) -> None:
    """Stages, scores, sizes, seconds, as a table."""
    from rich.console import Console
    from rich.table import Table

    metric = next((m for m in ("perplexity", "accuracy", "pearson") if any(m in score for score in record.scores.values())), "loss")
    table = Table(title=f"{record.paper} on {record.model}, {record.bits:.2f} bits a weight on average", title_justify="left")
    for column in ("", metric, "bytes", "steps", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    steps = sum(len(history["loss"]) for history in record.history)
    names = list(dict.fromkeys([*record.scores, *record.sizes]))
    for name in names:
        score, size = record.scores.get(name, {}).get(metric), record.sizes.get(name)
        seconds = record.times.get("training") if name == "trained" else None
        table.add_row(name, "" if score is None else f"{score:,.2f}" if metric == "perplexity" else f"{score:.4f}", "" if size is None else f"{size:,}",
                      str(steps) if name == "trained" else "", "" if seconds is None else f"{seconds:.0f}")
    Console().print(table)


def _print_proofs(proofs: list[dict[str, Any]]) -> None:
    words = {True: "yes", False: "NO", None: "not made"}
    for proof in proofs:
        print(f"  {words[proof['passed']]:8} {proof['claim']} [{proof['reader']}]: {proof['result']}")


def _print_plan(plan: dict[str, Any]) -> None:
    rows = plan.pop("coverage")
    for row in rows:
        print(f"{row['name']:44} {row['layer']:12} {'x'.join(map(str, row['shape'])):12} {row['weight']:14} input {row['input']}")
    for name, value in plan.items():
        print(f"{name:16} {value / 2**20:,.0f} MiB" if name == "peak memory" else f"{name:16} {value:,.4g}" if isinstance(value, float) else f"{name:16} {value}")


def _say(line: str) -> None:
    sys.stderr.write(f"  {line}\n")
    sys.stderr.flush()


COMMANDS: dict[str, Callable[..., int]] = {"demo": demo, "run": _run, "list": list_papers, "show": show, "eval": evaluate, "generate": generate,
                                           "export": export, "verify": verify, "report": report, "doctor": doctor}


if __name__ == "__main__":
    sys.exit(main())
