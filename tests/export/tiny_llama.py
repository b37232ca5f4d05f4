"""A Llama small enough for every test, with grouped keys so that q and k differ; a vocabulary as sentencepiece makes them."""

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qatlas.export import Checkpoint

TEXT = ["the cat sat on the mat, and the dog did not.", "Once upon a time there were 3 little pigs; they'd built 42 houses!",
        "a b c  d\n\nnew line\ttab", "naïve café – déjà vu", "it's what we've got, isn't it?"]
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": 310, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0}
    config = LlamaConfig(tie_word_embeddings=tied, **{**sizes, **changes})
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.06 if weight.dim() == 2 else 1 + 0.1 * torch.randn_like(weight))
    return model


def checkpoint(model, quant, tokenizer=None):
    """The model with its layers quantized by `quant` (None leaves them), and the same numbers written back into the model."""
    tensors = {}
    for name, weight in model.state_dict().items():
        if model.config.tie_word_embeddings and name == "lm_head.weight":
            continue
        matrix = name.endswith("weight") and name.split(".")[-2] in MATRICES
        tensors[name] = quant.quantize(weight) if matrix and quant is not None else weight.clone()
    model.load_state_dict({name: t if isinstance(t, torch.Tensor) else t.dequantize() for name, t in tensors.items()}, strict=False)
    return Checkpoint(model.config.to_dict(), tensors, tokenizer, "tiny")
