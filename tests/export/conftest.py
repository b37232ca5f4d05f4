"""A Llama small enough for every test, with grouped keys so that q and k differ, and tokenizers of both kinds."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qatlas.export import Checkpoint
from qatlas.export.gguf import TARGETS

TEXT = ["the cat sat on the mat, and the dog did not.", "Once upon a time there were 3 little pigs; they'd built 42 houses!",
        "a b c  d\n\nnew line\ttab", "naïve café – déjà vu", "it's what we've got, isn't it?"]
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """Byte-level BPE of 300 pieces, as GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(TEXT * 10, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture(scope="session")
def sentences_dir(tmp_path_factory):
    """Sentencepiece-like BPE: characters, U+2581 for space, byte fallback, bos before the text."""
    return sentencepiece_like(tmp_path_factory.mktemp("sentencepiece"))


def sentencepiece_like(folder):
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    words = " ".join(TEXT[:2]).split()
    letters = sorted(set("".join(words)) | {"▁"})
    joined = ["th", "▁th", "the", "▁the", "at", "▁c", "it", "tt", "le", "▁l", "▁lit", "ttle"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *joined]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = [(piece[:i], piece[i:]) for piece in joined for i in range(1, len(piece)) if piece[:i] in ids and piece[i:] in ids]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    return folder


def llama(tied=False, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(**{**dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=310,
                                   max_position_embeddings=128, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0), **changes})
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.06 if weight.dim() == 2 else 1 + 0.1 * torch.randn_like(weight))
    return model


def checkpoint(model, quant, tokenizer=None):
    """The model with its layers quantized by `quant` (None leaves them), and the same numbers written back into the model."""
    tensors = {}
    for name, weight in model.state_dict().items():
        if model.config.tie_word_embeddings and name == "lm_head.weight":
            continue
        tensors[name] = quant.quantize(weight) if quant is not None and name.endswith("weight") and name.split(".")[-2] in MATRICES else weight.clone()
    model.load_state_dict({name: t if isinstance(t, torch.Tensor) else t.dequantize() for name, t in tensors.items()}, strict=False)
    return Checkpoint(model.config.to_dict(), tensors, tokenizer, "tiny")


def quant_of(target):
    return TARGETS[target]
