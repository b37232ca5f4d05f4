"""Tiny models of five families and two of our own, and their quantized forms made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qatlas.core.grain import Group
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax
from qatlas.core.scheme import weight
from qatlas.layers.conv import QConv1d, QConv2d
from qatlas.layers.embedding import QEmbedding
from qatlas.layers.linear import QLinear, QTransposed
from qatlas.layers.quantized import Slots

KINDS = {nn.Linear: QLinear, Conv1D: QTransposed, nn.Conv1d: QConv1d, nn.Conv2d: QConv2d, nn.Embedding: QEmbedding}


def llama(tie: bool = True) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                        vocab_size=128, max_position_embeddings=64, tie_word_embeddings=tie))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64, bos_token_id=0, eos_token_id=0))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification
    return BertForSequenceClassification(BertConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128,
                                                    max_position_embeddings=64, num_labels=3))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification
    return ViTForImageClassification(ViTConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=16,
                                               patch_size=4, num_labels=3))


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification
    return ResNetForImageClassification(ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[3, 1], layer_type="basic", num_labels=3))


class Plain(nn.Module):
    """A module that no library knows, with a buffer and a shared layer."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, 32), nn.Linear(32, 4)
        self.again = self.first
        self.register_buffer("mean", torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((self.first(x - self.mean) + self.again(x)).relu())


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit, "resnet": resnet, "plain": Plain}


def batch(name: str) -> dict[str, torch.Tensor]:
    if name == "plain":
        return {"x": torch.linspace(-1, 1, 128).view(2, 64)}
    if name in ("vit", "resnet"):
        return {"pixel_values": torch.linspace(-2, 2, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}
    return {"input_ids": torch.arange(20).view(2, 10)}


def quant(bits: int = 4) -> Quant:
    """Per row, scales stored as fp16: the file's type is not the parameter's."""
    q = weight(bits)
    return q.but(scale=AbsMax(dtype="float16"))


def quantized(model: nn.Module, slots: Slots | None = None, only: str = "") -> nn.Module:
    done: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        kind = KINDS.get(type(module))
        if kind is None or only not in name:
            continue
        parent, _, last = name.rpartition(".")
        done.setdefault(id(module), kind.of(module, slots or Slots(weight=quant())))
        setattr(model.get_submodule(parent), last, done[id(module)])
    return model.eval()


def made(name: str, slots: Slots | None = None, only: str = "") -> nn.Module:
    torch.manual_seed(0)
    return quantized(MODELS[name]().eval(), slots, only)


@torch.no_grad()
def answer(model: nn.Module, name: str) -> torch.Tensor:
    out = model(**batch(name))
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Models this small lose more to threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny() -> SimpleNamespace:
    return SimpleNamespace(models=MODELS, batch=batch, quant=quant, quantized=quantized, made=made, answer=answer, group=Group, Slots=Slots)
