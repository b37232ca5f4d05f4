"""A tiny BERT, a tiny ViT, a tiny GPT-2, a tiny Llama, and tasks for them."""

import numpy as np
import torch
from tiny import letters
from tiny import llama as tiny_llama
from tiny import task as text
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from qatlas.train import data
from qatlas.train.labelled import Classification, Images
from qatlas.train.run import Run

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SAID = ["the cat sat", "a dog ran to the barn", "it rained", "all day on us", "red barn", "the mat"]


class Letters:
    """A tokenizer of 32 ids; 0 is padding."""

    def __init__(self, more=()):
        self.more = list(more)

    def get_vocab(self):
        return {chr(97 + i): i for i in range(26)} | {name: 26 + i for i, name in enumerate(self.more)}

    def __call__(self, rows, *_, **__):
        ids = [[1 + i % 31 for i in letters(row)] for row in rows]
        n = max(map(len, ids))
        return {"input_ids": torch.tensor([row + [0] * (n - len(row)) for row in ids]),
                "attention_mask": torch.tensor([[1] * len(row) + [0] * (n - len(row)) for row in ids])}


def bert(seed=0, layers=2, **more):
    torch.manual_seed(seed)
    config = BertConfig(**{**SIZE, **QUIET, "num_hidden_layers": layers, "vocab_size": 32, "max_position_embeddings": 64, "num_labels": 3, **more})
    model = BertForSequenceClassification(config).eval()
    loud(model)
    return model


def loud(model, by=4.0):
    """Weights large enough for attention to say something."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and not any(table in name for table in ("embeddings", "wte", "wpe")):
                p.mul_(by)


def vit(seed=0):
    torch.manual_seed(seed)
    model = ViTForImageClassification(ViTConfig(**SIZE, **QUIET, image_size=8, patch_size=4, num_labels=3)).eval()
    loud(model)
    return model


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=64, bos_token_id=0, eos_token_id=0, resid_pdrop=0, attn_pdrop=0,
                        embd_pdrop=0)
    model = GPT2LMHeadModel(config).eval()
    loud(model)
    return model


def sentences(run=None, labels=(0, 1, 2, 0, 1, 2), **more):
    rows = {"text": SAID, "label": list(labels)}
    return Classification(data.Table(rows, rows), Letters(), batch=3, run=run or Run(progress=False), **more)


def images(folder, run=None):
    draw = np.random.default_rng(0)
    path = folder / "images.npz"
    np.savez(path, x=draw.integers(0, 255, (12, 8, 8, 3), dtype=np.uint8), y=np.arange(12) % 3)
    return Images(str(path), batch=4, run=run or Run(progress=False))


def pair(kind, tmp_path):
    """A model and its task."""
    return {"bert": lambda: (bert(), sentences()), "vit": lambda: (vit(), images(tmp_path)), "gpt2": lambda: (gpt2(), text()),
            "llama": lambda: (tiny_llama(), text())}[kind]()
