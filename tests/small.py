"""A Llama of two layers with a tokenizer of its own, as a directory that transformers has written, and a text: input of whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = "the cat sat on a mat and the dog ran to the red barn while it rained on us all day. "
FLAGS = ("--length", "32", "--batch", "4", "--threads", "1")


def write_tokenizer(folder: Path) -> int:
    """Byte-level BPE; the number of its pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([WORDS] * 10, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}))
    return int(tokenizer.get_vocab_size())


def write_llama(folder: Path, width: int = 64, tokenizer: bool = True, **config: object) -> Path:
    """The directory of a small random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True)
    vocabulary = write_tokenizer(folder) if tokenizer else 300
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": vocabulary, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**sizes, **config})).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def write_text(path: Path) -> Path:
    """Some thousand words."""
    path.write_text(WORDS * 200)
    return path
