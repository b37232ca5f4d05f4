"""The commands that run a saved model: `qatlas generate` and `qatlas bench`. As in commands.py, arguments are flags and docstrings are help."""

from __future__ import annotations

import json
from pathlib import Path

from . import table
from .commands import quickened, quiet, say
from .core.error import CheckpointError, RunError


def generate(directory: str, prompt: str = "The with statement", tokens: int = 60, fast: bool = False, cache: str = "codes",
             threads: int = 0) -> int:
    """Continue a prompt with a saved model.

    A packed model dequantizes each weight when it is needed: bit for bit what was trained, and slow. With --fast its layers multiply straight from
    the codes: the same up to the order of sums, and which layers do is told. Keys and values are stored as codes where the model quantizes them;
    --cache values keeps what was dequantized beside them: the same bits, in less time and more memory.

        qatlas generate DIR --prompt "Once upon a time" --fast

    Args:
        directory: of a run, or of any transformers language model.
        prompt: the text to continue.
        tokens: how many new tokens.
        fast: multiply by kernels, straight from the codes.
        cache: codes, or values beside them.
        threads: threads of torch and of the kernels; 0 leaves them as they are.
    """
    import torch

    from .job import generate as speak
    from .model.load import load
    from .model.serving import keep

    quiet()
    torch.set_num_threads(threads) if threads else None
    model, tokenizer = load(directory)
    if tokenizer is None or not getattr(model, "can_generate", lambda: False)():
        found = f"{type(model).__name__}{'' if tokenizer else ' without a tokenizer'}"
        raise CheckpointError(f"{directory} holds a {found}; only a language model speaks")
    keep(model, cache)
    print(speak(quickened(model) if fast else model, tokenizer, prompt, tokens))
    return 0


def bench(directory: str, ways: str = "fp32,bf16,exact,fast,llama.cpp", prompt: int = 128, tokens: int = 32, repeats: int = 5, threads: int = 0,
          out: str | None = None) -> int:
    """Measure how fast a saved packed language model runs here, beside itself in other forms.

    fp32 and bf16 are its weights dequantized; exact is the packed model as it is, which dequantizes in each forward; fast multiplies straight from
    the codes; llama.cpp runs its GGUF, where one holds the model exactly (train with --target gguf:q4_0, say). Each is a process of its own, they
    measure in turn, and medians are told. "limit" is the most tokens a second that memory allows, since each token reads every weight once.

        qatlas bench DIR                                     all that is here, one table
        qatlas bench DIR --ways exact,fast --threads 2       these alone
        qatlas bench DIR --out bench.json                    and every round, for scripts

    Args:
        directory: of a run, or of any packed language model of ours.
        ways: forms, with commas between them.
        prompt: tokens read at once.
        tokens: tokens then said one by one.
        repeats: rounds that count; one more warms up.
        threads: of each form; 0 is as many as torch takes.
        out: a JSON file for the rows, the setting and every round.
    """
    import torch

    from .bench import bench as measure

    if out is not None and not Path(out).resolve().parent.is_dir():
        raise RunError(f"--out {out}: there is no such directory")
    quiet()
    found = measure(directory, ways=[way.strip() for way in ways.split(",") if way.strip()], prompt=prompt, tokens=tokens, repeats=repeats,
                    threads=threads or torch.get_num_threads(), say=say)
    table.bench(found)
    if out is not None:
        Path(out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0
