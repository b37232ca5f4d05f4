"""A tiny Llama, a tiny text, layers with quantizers, and a tactic that breaks a run off."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qatlas.core.scheme import scheme
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Slots
from qatlas.train import data
from qatlas.train.run import Run
from qatlas.train.tactic import Tactic
from qatlas.train.task import LanguageModelling

WORDS = "the cat sat on a mat and the dog ran to the red barn while it rained on us all day "


def letters(text):
    """A tokenizer of 32 ids."""
    return [ord(c) % 32 for c in text]


def llama(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                         max_position_embeddings=64, attention_dropout=dropout, attn_implementation="eager")
    return LlamaForCausalLM(config)


def quantized(model, text="w2", keep="each"):
    """Every linear inside the blocks, as `model.rules.quantize` would do it."""
    quants = scheme(text)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "layers" in name:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, QLinear.of(module, Slots(quants.weight, quants.input, keep=keep)))
    return model


def task(batch=4, length=16, run=None, **more):
    return LanguageModelling(data.Text(WORDS * 20, WORDS * 4), letters, length=length, batch=batch, run=run or Run(progress=False), **more)


class Stop(Tactic):
    """Break the run off at the end of a step, leaving its resume points; None: never."""

    def __init__(self, at=None):
        self._at = at

    def after(self, loop):
        if loop.step == self._at:
            raise KeyboardInterrupt
