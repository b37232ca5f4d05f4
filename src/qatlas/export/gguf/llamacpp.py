"""Ask llama.cpp itself: the last word on whether a file means what we think.

llama.cpp comes as the prebuilt wheel xllamacpp (extra "llamacpp"): its server, in a process of its own, on one thread unless told otherwise. A
process of its own, because a file that llama.cpp dislikes can end the process that asked, because its logs then go nowhere, and because its end is
clean.

What to expect: keys and values are kept in fp32 here and attention is the plain one, so a file of F32 weights gives our log-probabilities to 1e-5.
With quantized weights llama.cpp also quantizes the *inputs* of every matrix product to 8 bits, as the weight's type demands, and a file cannot ask
it not to:

    weight        inputs                                   top-10 log-probabilities of a small random model
    F32           fp32                                     3e-6; 1e-3 in Gemma and BERT, whose gelu llama.cpp looks up in a table of fp16 numbers
    Q8_0, Q4_0    8 bits, groups of 32, fp16 step          0.05; with the same rounding of inputs done by us, to 1e-6
    TQ2_0         8 bits, groups of 256, fp32 step         the same

The last holds until an input sits on the edge of two codes; then some 0.01. A model that shall be at its best there trains with 8-bit inputs in
groups of 32.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...core.error import FormatError, RunError
from .file import field, open_file

CHILD = Path(__file__).with_name("llamacpp_process.py")


def available() -> bool:
    """Whether the wheel is installed."""
    return find_spec("xllamacpp") is not None


def next_logprobs(path: str | Path, prompt: str | Sequence[int], k: int = 10) -> dict[int, float]:
    """The k most probable next tokens after a prompt (text, or token ids taken as they are) -> their natural log-probabilities."""
    return many_logprobs(path, [prompt], k)[0]


def many_logprobs(path: str | Path, prompts: Sequence[str | Sequence[int]], k: int = 10) -> list[dict[int, float]]:
    """`next_logprobs` of several prompts with one start of the engine."""
    # The server leaves out a token whose text is half a character, and its probabilities with it. What it reports comes from the logits before
    # any bias, so a bias makes it say a letter and changes nothing else.
    ask = {"max_tokens": 1, "temperature": 0.0, "logprobs": k, "cache_prompt": False, "logit_bias": [[_letter(path), 1e6]]}
    answers = _ask(path, [{"complete": {**ask, "prompt": prompt if isinstance(prompt, str) else list(prompt)}} for prompt in prompts])
    tops = [answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] for answer in answers]
    return [{top["id"]: top["logprob"] for top in sorted(found, key=lambda top: -top["logprob"])} for found in tops]


def each_logprob(path: str | Path, prompts: Sequence[Sequence[int]], k: int = 10) -> list[list[dict[int, float]]]:
    """What llama.cpp says at each place of a text: of each prompt, for each of its tokens but the first, the k most probable tokens there and the
    token that stands there -> log-probability."""
    names = field(open_file(path), "tokenizer.ggml.tokens") or []
    asked = {"k": k, "all": len(names), "letter": _letter(path)}
    answers = _ask(path, [{"each": asked | {"prompt": list(prompt)}} for prompt in prompts])
    return [[dict(zip(ids, values, strict=True)) for ids, values in answer] for answer in answers]


def generate(path: str | Path, text: str, n: int = 32) -> str:
    """The n most probable tokens after a text, one after the other, as text (fewer when the text ends)."""
    return str(_ask(path, [{"complete": {"prompt": text, "max_tokens": n, "temperature": 0.0, "cache_prompt": False}}])[0]["choices"][0]["text"])


def clocked(path: str | Path, threads: int = 1, prompt: int = 128, tokens: int = 32, seed: int = 0) -> dict[str, float]:
    """Seconds of a random prompt and of the tokens after it by llama.cpp's own clock, with its own choice of cache and attention:
    {"load", "prefill", "decode"} in seconds, {"peak"} of memory in bytes, more than the process held before it loaded."""
    names = field(open_file(path), "tokenizer.ggml.tokens") or []
    if not names:
        raise FormatError(f"{path} has no vocabulary, and llama.cpp's server answers in words; write it from a checkpoint with a tokenizer")
    draw = random.Random(seed)
    ask = {"prompt": [draw.randrange(len(names)) for _ in range(prompt)], "n_predict": tokens, "temperature": 0.0, "cache_prompt": False,
           "ignore_eos": True}
    answer = _ask(path, [{"clock": ask}], threads=threads, plain=False)[0]
    if (answer["said"], answer["read"]) != (tokens, prompt):
        raise FormatError(f"llama.cpp read {answer['read']} tokens of {prompt} and said {answer['said']} of {tokens}: other than asked")
    return {key: answer[key] for key in ("load", "prefill", "decode", "peak")}


def tokenize(path: str | Path, texts: Sequence[str], special: bool = True) -> list[list[int]]:
    """Texts -> the ids that llama.cpp gives them. special: frame them with bos and eos as the header says, and read special tokens in the text."""
    answers = _ask(path, [{"tokenize": {"content": text, "add_special": special, "parse_special": special}} for text in texts])
    return [answer["tokens"] for answer in answers]


def vectors(path: str | Path, prompts: Sequence[str | Sequence[int]], pooling: str = "") -> list[list[list[float]]]:
    """What an encoder says of each prompt (text is framed and cut by llama.cpp, ids are taken as they are): its vectors, one for all tokens or one
    for each, as the file's pooling has it. pooling: another ("none", "mean", "cls")."""
    asked = [{"embeddings": {"content": prompt if isinstance(prompt, str) else list(prompt), "embd_normalize": -1}} for prompt in prompts]
    return [answer[0]["embedding"] for answer in _ask(path, asked, pooling=pooling)]


def scores(path: str | Path, prompts: Sequence[str | Sequence[int]]) -> list[list[float]]:
    """The class scores of an encoder with a classifier, for each prompt."""
    reader = open_file(path)
    labels = field(reader, f"{field(reader, 'general.architecture')}.classifier.output_labels")
    if not labels:
        raise FormatError(f"{path} has no classifier")
    return [found[0][: len(labels)] for found in vectors(path, prompts, "rank")]     # the endpoint pads them to the width of the model


def _letter(path: str | Path) -> int:
    """The id of some ordinary piece that is one whole character."""
    reader = open_file(path)
    names, kinds = field(reader, "tokenizer.ggml.tokens") or [], field(reader, "tokenizer.ggml.token_type") or []
    found = (i for i, (name, kind) in enumerate(zip(names, kinds, strict=False)) if kind == 1 and name.isascii() and name.isalpha())
    return next(found, 0)


def _ask(path: str | Path, jobs: list[dict[str, Any]], threads: int = 1, seconds: float = 600, pooling: str | None = None,
         plain: bool = True) -> list[Any]:
    """Start, put the questions, collect the answers, end."""
    if not available():
        raise RunError('llama.cpp is not installed here; pip install "qatlas[llamacpp]"')
    reader = open_file(path)
    if field(reader, "tokenizer.ggml.model") in (None, "none", "no_vocab"):
        raise FormatError(f"{path} has no vocabulary, and llama.cpp's server answers in words; write it from a checkpoint with a tokenizer")
    context = int(field(reader, f"{field(reader, 'general.architecture')}.context_length") or 512)
    request = json.dumps({"path": str(path), "context": min(context, 4096), "threads": threads, "jobs": jobs, "pooling": pooling, "plain": plain})
    quiet = {**os.environ, "GGML_NO_BACKTRACE": "1"}              # without it an abort starts a debugger
    done = subprocess.run([sys.executable, str(CHILD)], input=request, capture_output=True, text=True, timeout=seconds, env=quiet, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if " E " in line[:16] or "ASSERT" in line] or done.stderr.splitlines()[-3:]
        raise FormatError(f"llama.cpp did not take {path} (exit {done.returncode}); it says:\n  " + "\n  ".join(said[:8]))
    return list(json.loads(done.stdout))
