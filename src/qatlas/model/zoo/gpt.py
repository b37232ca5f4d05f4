"""A language model that was trained, and the text that it was trained on.

3.4 million parameters, byte-level BPE of 1,024 entries, a context of 512 tokens; it speaks the English of Python's documentation. Each matrix has
256 or 768 columns: whole blocks for every format with groups up to 256 (llama.cpp's K and TQ types, MX, NVFP4). The head is the embedding.

Both texts lie beside the weights, so that perplexity on the held-out part, further training on the rest and calibration need no download, and mean
the same on every machine. gpt/SOURCES.md says where they come from, under which licence, and what the weights reach on them; it is also the
place where `text` looks up the sha256 of each. runs/zoo_gpt.sh makes all of it anew.
"""

import hashlib
import lzma
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DIRECTORY = Path(__file__).parent / "gpt"                         # what from_pretrained takes


def gpt() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The trained model, in fp32 and eval mode, and its tokenizer.

    The model maps ids (batch, tokens) to logits (batch, tokens, 1024), up to 512 tokens. Id 0, `<|endoftext|>`, begins every document: put it before
    a prompt. The tokenizer does not do so by itself; it reads the words `<|endoftext|>` in a text as that one id.

    Raises OSError if the weights are missing (a checkout or a wheel without its data files).

    >>> model, tokenizer = gpt()
    >>> ids = tokenizer("<|endoftext|>Return a string", return_tensors="pt").input_ids
    >>> tuple(model(ids).logits.shape) == (1, ids.shape[1], 1024)
    True
    """
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(DIRECTORY, local_files_only=True)


def text(split: str) -> str:
    """The text of "train" (2.5 MB) or "heldout" (0.1 MB), with `<|endoftext|>` before each document and after the last.

    No paragraph of 60 characters and more is in both. Raises ValueError for another name and where the text is not the one that SOURCES.md describes.

    >>> text("heldout").startswith("<|endoftext|>")
    True
    """
    sources = (DIRECTORY / "SOURCES.md").read_text(encoding="utf-8")
    known = dict(re.findall(r"^\| `(\w+)\.txt\.xz` .*`([0-9a-f]{64})` \|$", sources, re.MULTILINE))
    if split not in known:
        raise ValueError(f'no text named "{split}"; there are {", ".join(map(repr, known))}')
    raw = lzma.decompress((DIRECTORY / f"{split}.txt.xz").read_bytes())
    if (found := hashlib.sha256(raw).hexdigest()) != known[split]:
        raise ValueError(f"{split}.txt.xz holds another text: sha256 {found}, SOURCES.md says {known[split]}. Restore both from one version.")
    return raw.decode()
