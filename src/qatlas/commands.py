"""The commands that `qatlas` has besides `run`: each a function whose arguments are its flags and whose docstring is its help. They print, and return
the exit code."""

from __future__ import annotations

import inspect
import shlex
import sys
from pathlib import Path
from typing import Any

from . import table
from .core.error import DataError, FormatError, RunError
from .flags import first_line, run_parser


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
    outcome = play(out, steps=steps, seed=seed, threads=threads, resume=resume, say=say)
    table.scores(outcome.record)
    table.proofs(outcome.record.proofs)
    for stage, text in outcome.record.samples.items():
        print(f"\n{stage}: {text}")
    print(f"\n{out}/report.html shows all of it; {out}/exports/gguf-tq2_0/model.gguf runs in llama.cpp; "
          f"AutoModelForCausalLM.from_pretrained({out!r}) loads it after `import qatlas`")
    return code(outcome.record.proofs)


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
             task_path: str | None = None, limit: int | None = None, shots: int | None = None, fast: bool = False) -> int:
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
        fast: multiply by kernels, straight from the codes; sums run in another order (see `qatlas generate --help`).
    """
    quiet()
    if tasks:
        return _benchmark(list(directory), [task.strip() for task in tasks.split(",") if task.strip()], task_path, limit, shots, batch, fast)
    if wrong := [name for name, value in (("task_path", task_path), ("limit", limit), ("shots", shots)) if value is not None]:
        raise DataError(f"--{wrong[0]} is of benchmarks; say which: --tasks NAME,NAME")
    for each in directory:
        found = _judged(each, data, length, batch, fast)
        print(each) if len(directory) > 1 else None
        table.pairs(found)
    return 0


def _judged(directory: str, data: str | None, length: int | None, batch: int, fast: bool = False) -> dict[str, float]:
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
    return dict(judge(quickened(model) if fast else model, task))


def _benchmark(directories: list[str], tasks: list[str], task_path: str | None, limit: int | None, shots: int | None, batch: int,
               fast: bool = False) -> int:
    from .model.load import load
    from .train.benchmark import benchmark, keep, lacks

    if lacks():
        raise RunError(str(lacks()))
    scores = {}
    for each in directories:
        model, tokenizer = load(each)
        scores[each] = benchmark(quickened(model) if fast else model, tokenizer, tasks, task_path=task_path, limit=limit, shots=shots, batch=batch)
        if Path(each).is_dir():
            keep(each, scores[each], limit=limit, shots=shots)
    table.benchmarks(scores)
    return 0


def compare(*paper: str, model: str = "zoo:gpt", data: str = "builtin:docs", task: str = "auto", bits: str = "4,2", steps: int = 100, seeds: int = 3,
            shared: str | None = None, against: str | None = None, out: str = "comparison", length: int = 256, batch: int = 8,
            micro: int | None = None, precision: str = "no", compile: str = "no", threads: int = 0) -> int:
    """Run papers on one task with one budget, one data order and one evaluation, and draw up the table.

    An entry is a paper, or a paper with arguments of its own:

        qatlas compare plain lsq paretoq lsq:distil=true --bits 4,2,1.58 --steps 100 --out comparison

    "plain" is the control: full precision, trained for as long. Each run is kept as a small file in out/runs: one that is there is not repeated, one
    that was stopped goes on. out/report.html and table.md hold the result, with 95 % intervals over seeds and the command of each run.

    Args:
        paper: entries: names of papers (see `qatlas list`), or name:argument=value,argument=value.
        model: a hub id, a directory, a GGUF file, or zoo:gpt, zoo:vit, zoo:resnet.
        data: a hub id, a file, or builtin:docs.
        task: lm, chat, classification or image; auto looks at the model.
        bits: bits of the weights, with commas between them.
        steps: optimizer steps of each run.
        seeds: runs of each entry, seeds 0, 1, ...
        shared: arguments for every paper that has them, such as distil=true,lr=1e-3.
        against: the entry that the others are held against, seed by seed, at the same bits; by default the first but plain.
        out: the directory; the same command goes on in it.
        length: tokens of a window (lm, chat) or of a sentence.
        batch: rows of an optimizer step.
        micro: rows of one forward.
        precision: no (fp32) or bf16.
        compile: quant compiles the fake quantization, step the whole of forward and backward besides.
        threads: threads of torch; 0 leaves them as they are.
    """
    import torch

    from .compare import compare as play
    from .compare import read_arguments
    from .prepare import Job

    quiet()
    try:
        widths = [float(each) for each in bits.split(",")]
    except ValueError:
        raise RunError(f"--bits {bits}: numbers with commas between them, such as 4,2,1.58") from None
    torch.set_num_threads(threads) if threads else None
    told = {"model": model, "data": data, "task": task, "bits": bits, "steps": steps, "seeds": seeds, "shared": shared, "against": against,
            "out": out, "length": length, "batch": batch}
    command = shlex.join(["qatlas", "compare", *paper, *(f"--{key}={value}" for key, value in told.items() if value is not None)])
    job = Job(model=model, data=data, task=task, out=out, length=length, batch=batch, micro=micro, precision=precision, compile=compile)
    found = play(paper, job, widths, steps, seeds, read_arguments(shared), against, command, say)
    table.compared(found)
    print(f"{out}/report.html, table.md and comparison.png show it; {out}/runs holds each run")
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
    return code(found)


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


def quickened(model: Any) -> Any:
    """The model on kernels; each way that its layers go is said."""
    from .model.fast import fast, routes, told

    model = fast(model)
    for line in told(routes(model)):
        say(line)
    return model


def quiet() -> None:
    """Silence transformers' bars and warnings, which speak of steps that take no time; its downloads keep their bar."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if sys.stderr.isatty():
        enable_progress_bars()


def code(proofs: list[dict[str, Any]]) -> int:
    """0 where every proof that was made passed, else 1."""
    return int(any(proof["passed"] is False for proof in proofs))


def say(line: str) -> None:
    """A line of what is being done, for people who watch."""
    sys.stderr.write(f"  {line}\n")
    sys.stderr.flush()
