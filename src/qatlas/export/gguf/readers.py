"""Other people's readers of a GGUF file: transformers, which dequantizes it, and llama.cpp, which runs it."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import Tensor

from ...core.error import foreign
from .file import open_file
from .llamacpp import available, many_logprobs


@torch.no_grad()
def logits(path: str | Path, prompts: list[list[int]]) -> Tensor:
    """(prompts, vocabulary) fp32: what transformers computes after each prompt with the file's weights.

    Raises:
        FormatError: a file that it cannot load.
    """
    from transformers import AutoModelForCausalLM

    path = Path(path)
    open_file(path)                                               # transformers believes the header
    with foreign(f"transformers cannot load {path}"), contextlib.redirect_stderr(io.StringIO()):    # it draws a bar that no setting turns off
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True)
        return torch.cat([model(torch.tensor([prompt])).logits[:, -1] for prompt in prompts])


def engine(path: str | Path, prompts: list[list[int]]) -> list[dict[int, float]] | str:
    """The ten most probable next tokens of each prompt, token -> log-probability; or, where llama.cpp is not installed, a sentence that says so."""
    return many_logprobs(path, prompts) if available() else "llama.cpp is not installed: pip install 'qatlas[llamacpp]'"
