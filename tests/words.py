"""A small random Llama and a task on a few words: what the tests of low-rank papers train on."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qatlas.train import data
from qatlas.train.run import Run
from qatlas.train.task import LanguageModelling

WORDS = "the cat sat on a mat and the dog ran to the red barn while it rained on us all day "
IDS = torch.arange(24).view(2, 12) * 7 % 96


def llama(width=64):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, max_position_embeddings=64)).eval()


def task(**more):
    text = data.Text(WORDS * 20, WORDS * 4)
    return LanguageModelling(text, lambda t: [ord(c) % 96 for c in t], length=16, batch=4, run=more.pop("run", Run(progress=False)), **more)


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
