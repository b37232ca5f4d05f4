"""Other people's readers of a GGUF file: transformers, which dequantizes it, and llama.cpp, which runs it.

transformers' reader takes the weights of every architecture it knows, but not all numbers of the header: what it overlooks it replaces by the default
of its config class. A file for which that is wrong is not asked about, and `logits` says why; llama.cpp reads those numbers.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.error import foreign
from . import llama
from .file import field, open_file
from .llamacpp import available, many_logprobs, scores

OVERLOOKED: dict[str, dict[str, float]] = {                        # numbers of the header -> the only one with which transformers computes
    "qwen3": {"attention.key_length": 128}, "gemma3": {"attention.key_length": 256, "rope.freq_base_swa": 10000.0},
    "gemma2": {"attention.key_length": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}}
UNKNOWN = ("gemma", "bert")


@torch.no_grad()
def logits(path: str | Path, prompts: list[list[int]]) -> Tensor | str:
    """(prompts, vocabulary) fp32: what transformers computes after each prompt with the file's weights; or a sentence on why it cannot.

    Raises:
        FormatError: a file that it cannot load.
    """
    from transformers import AutoModelForCausalLM

    path = Path(path)
    reason = overlooked(open_file(path))                          # and transformers believes the header
    if reason is not None:
        return reason
    with foreign(f"transformers cannot load {path}"), contextlib.redirect_stderr(io.StringIO()):    # it draws a bar that no setting turns off
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True)
        return torch.cat([model(torch.tensor([prompt])).logits[:, -1] for prompt in prompts])


def overlooked(reader: Any) -> str | None:
    """Why transformers would compute something else than the file says, or None."""
    name = field(reader, "general.architecture")
    if name in UNKNOWN:
        return f"transformers reads no GGUF file of the architecture {name!r}"
    if field(reader, f"{name}.rope.scaling.type") or any(tensor.name == llama.FREQUENCIES for tensor in reader.tensors):
        return "transformers' GGUF reader overlooks the rotary scaling that the file holds"
    wrong = [f"{key} {found:g} (it takes {known:g})" for key, known in OVERLOOKED.get(name, {}).items()
             if (found := field(reader, f"{name}.{key}")) is not None and found != known]
    return f"transformers' GGUF reader overlooks {', '.join(wrong)}" if wrong else None


def engine(path: str | Path, prompts: list[list[int]]) -> list[dict[int, float]] | str:
    """The ten most probable next tokens of each prompt, or all classes, -> log-probability; or a sentence on why llama.cpp was not asked."""
    if not available():
        return "llama.cpp is not installed: pip install 'qatlas[llamacpp]'"
    reader = open_file(path)
    name = field(reader, "general.architecture")
    if name != "bert":
        return many_logprobs(path, prompts)
    if not field(reader, f"{name}.classifier.output_labels"):
        return "the encoder has no classifier whose answers could be compared"
    found = torch.tensor(scores(path, prompts), dtype=torch.float64).log_softmax(-1)
    return [dict(enumerate(row)) for row in found.tolist()]
