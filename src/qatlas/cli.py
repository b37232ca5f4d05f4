"""The command line: what people type. Each command reads its flags from the signature of a function, calls it, and prints; errors for people end
with code 2.

    qatlas demo                                      the main job on the model that ships with the package, in a few minutes
    qatlas run lsq --model DIR --data FILE --bits 4 --target gguf:q4_0 --out DIR
    qatlas run lsq --plan                            what that would do: coverage, refusals, memory, time
    qatlas list | show PAPER                         the shelf
    qatlas compare PAPER PAPER --bits 4,2            papers under equal conditions: table, figure, page
    qatlas eval | generate | export | verify | report DIR
    qatlas bench DIR                                 tokens a second and memory, beside fp32, bf16 and llama.cpp
    qatlas doctor                                    what this machine has

Every command takes --config file.yaml and prints one with --print_config; so a run is a file, if you like.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence

from . import commands, serve, table
from .commands import code, quiet, say
from .core.error import QatlasError, unknown
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
        say(f"data: {job.data}, Python's documentation, which ships with qatlas; give --data FILE or a hub id to train on your own")
    if job.plan:
        table.plan(plan(argv[0], given, job))
        return 0
    outcome = run(argv[0], given, job, command=shlex.join(["qatlas", "run", *argv]), say=say)
    table.scores(outcome.record)
    table.proofs(outcome.record.proofs)
    if outcome.out is None:
        print("nothing was kept: give --out DIR to keep the model, the exports and the report")
    else:
        print(f"{outcome.out}: the model, exports, record.json and report.html")
    return code(outcome.record.proofs)


COMMANDS: dict[str, Callable[..., int]] = {
    "demo": commands.demo, "run": _run, "list": commands.list_papers, "show": commands.show, "compare": commands.compare, "eval": commands.evaluate,
    "generate": serve.generate, "bench": serve.bench, "export": commands.export, "verify": commands.verify, "report": commands.report,
    "doctor": commands.doctor}


if __name__ == "__main__":
    sys.exit(main())
