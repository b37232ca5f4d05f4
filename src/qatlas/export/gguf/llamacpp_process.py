"""The other side of llamacpp.py: a JSON request on stdin, a JSON list of answers on stdout, llama.cpp's logs on stderr. Run as a file, so that it
imports nothing of ours and starts in a tenth of a second. The server's port is open to this machine only, and only to who knows a random key.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import sys
import time
import urllib.request
from typing import Any


def main() -> None:
    """Read, ask, answer."""
    import xllamacpp

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                                 # whatever C++ prints is log
    request, key = json.load(sys.stdin), secrets.token_hex()
    params = xllamacpp.CommonParams()
    params.model.path = request["path"]
    params.n_ctx, params.n_parallel, params.n_gpu_layers = request["context"], 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    kind = xllamacpp.ggml_type.GGML_TYPE_F32
    if request["plain"]:
        params.cache_type_k, params.cache_type_v, params.flash_attn_type = kind, kind, xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.enable_chat_template, params.api_keys = False, False, [key]
    if request["pooling"] is not None:                            # vectors are asked for, not words
        params.embedding, params.embd_normalize, params.n_ubatch = True, -1, request["context"]
        params.n_batch = request["context"]
        if request["pooling"]:
            params.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{request['pooling'].upper()}")
    before, began = _peak(), time.perf_counter()
    server = xllamacpp.Server(params)
    loaded = time.perf_counter() - began
    answers = [_clock(server, key, job["clock"], loaded, before) if "clock" in job else _answer(server, key, job) for job in request["jobs"]]
    del server                                                    # waits for its loop
    json.dump(answers, out)
    out.close()


def _answer(server: Any, key: str, job: dict[str, Any]) -> Any:
    if "complete" in job:
        return _complete(server, job["complete"])
    if "each" in job:
        return _each(server, **job["each"])
    (name, content), = job.items()
    body = json.dumps(content).encode()
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    call = urllib.request.Request(f"{server.listening_address}/{name}", body, head)
    with urllib.request.urlopen(call, timeout=600) as reply:
        return json.load(reply)


def _clock(server: Any, key: str, asked: dict[str, Any], loaded: float, before: int) -> dict[str, float]:
    """The server's own timings of one completion."""
    times = _answer(server, key, {"completion": asked})["timings"]
    return {"load": loaded, "prefill": times["prompt_ms"] / 1e3, "decode": times["predicted_ms"] / 1e3, "read": times["prompt_n"],
            "said": times["predicted_n"], "peak": _peak() - before}


def _peak() -> int:
    """The largest resident size so far, in bytes. (What getrusage says begins, on Linux, with the size of the process that started this one.)"""
    try:
        with open("/proc/self/status", encoding="utf-8") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _complete(server: Any, asked: dict[str, Any]) -> Any:
    answer = server.handle_completions(asked)
    return json.loads(answer) if isinstance(answer, str | bytes) else answer


def _each(server: Any, prompt: list[int], k: int, all: int, letter: int) -> list[tuple[list[int], list[float]]]:
    """At each place of a prompt but the first: tokens and their log-probabilities, the one that stands there among them. Each question is longer by
    a token than the one before, which the server has kept."""
    found = []
    for n in range(1, len(prompt)):
        for most in (k, all):                                     # the whole vocabulary is slow to say, and seldom needed
            ask = {"max_tokens": 1, "temperature": 0.0, "logprobs": most, "cache_prompt": True, "logit_bias": [[letter, 1e6]], "prompt": prompt[:n]}
            top = _complete(server, ask)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            if any(one["id"] == prompt[n] for one in top):
                break
        top = [*top[:k], *(one for one in top[k:] if one["id"] == prompt[n])]
        found.append(([one["id"] for one in top], [one["logprob"] for one in top]))
    return found


if __name__ == "__main__":
    main()
