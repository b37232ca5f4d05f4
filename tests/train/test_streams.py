"""Streams: what walks from block to block is what the model's own forward hands on, bit for bit, in memory or on disk."""

import pytest
import torch
from tiny import llama, quantized, task
from torch import nn
from transformers import BertConfig, BertModel, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

from qatlas.core.error import QuantError
from qatlas.model.blocks import blocks, record
from qatlas.train.run import Run
from qatlas.train.streams import Walk, part
from qatlas.train.task import Task

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
IDS = {"input_ids": torch.arange(24).view(3, 8) % 32}
PADDED = IDS | {"attention_mask": torch.arange(8) < torch.tensor([[8], [5], [3]])}


class Given(Task):
    """The same batch of two sizes, in turn."""

    rows, held_rows, fingerprint = 1, 0, "given"

    def __init__(self, batch):
        super().__init__(3, None, (), Run(progress=False))
        self._batch = batch

    def batch(self, step):
        return {name: value[: 3 - step % 2] for name, value in self._batch.items()}

    def logits(self, model, batch):
        return model(**batch)


def gemma():
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=32, num_key_value_heads=2, head_dim=8, sliding_window=4, **SIZES))


MODELS = {
    "llama": (llama, IDS), "gemma": (gemma, IDS), "bert": (lambda: BertModel(BertConfig(vocab_size=32, max_position_embeddings=16, **SIZES)), PADDED),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=32, n_positions=16)), PADDED),
    "vit": (lambda: ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZES)), {"pixel_values": torch.randn(3, 3, 8, 8)}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("disk", [False, True])
def test_what_walks_is_what_the_model_hands_on(name, disk, tmp_path):
    torch.manual_seed(0)
    build, batch = MODELS[name]
    model, given = build().eval(), Given(batch)
    model.config.use_cache = False                                # a cache lays keys out otherwise, and sums differ in the last bit
    walk = Walk(model, given, 3, directory=tmp_path / "streams" if disk else None)
    assert walk.quantized is walk.full and walk.rows == [3, 2, 3]
    assert [m is None for m in walk.masks] == [batch is not PADDED] * 3
    for i in range(len(walk.names)):
        expected = [record(model, walk.names[i], [given.batch(k)], given.logits)[0].answer for k in range(3)]
        walk.push(i, walk.full)
        assert all(torch.equal(walk.full[k], expected[k]) for k in range(3)), walk.names[i]
    assert len(list(tmp_path.rglob("*.safetensors"))) == (3 if disk else 0)
    walk.close()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_blocks_of_two_kinds_are_recorded_twice_and_no_more():
    walk = Walk(gemma(), Given(IDS), 2)
    assert walk._kinds == [0, 1, 0, 1] and len(walk._rest) == 2
    assert Walk(llama(), Given(IDS), 2)._kinds == [0, 0]
    one, _, three = Walk(llama(), Given(IDS), 3)._rest[0]
    assert one.kwargs["position_embeddings"][0] is three.kwargs["position_embeddings"][0], "what is equal is kept once"


def test_two_streams_where_something_in_front_is_quantized():
    from qatlas.core.scheme import weight
    from qatlas.model.rules import Rule, quantize

    model = quantize(llama(), [Rule("*.embed_tokens", weight=weight(2))])
    walk = Walk(model, Given(IDS), 1)
    assert walk.quantized is not walk.full and not torch.equal(walk.quantized[0], walk.full[0])
    assert torch.equal(walk.full[0], Walk(llama(), Given(IDS), 1).full[0])


def test_a_fork_keeps_what_is_at_the_door():
    walk = Walk(quantized(llama()), Given(IDS), 2)
    walk.fork()
    door = walk.full[1].clone()
    walk.push(0, walk.full)
    assert torch.equal(walk.quantized[1], door) and not torch.equal(walk.full[1], door)


def test_a_part_of_a_batch_has_its_own_masks():
    model = BertModel(BertConfig(vocab_size=32, max_position_embeddings=16, **SIZES)).eval()
    walk = Walk(model, Given(PADDED), 1)
    hidden = walk.full[0]
    whole = walk.block(0)(*walk.call(0, 0, hidden).args, **walk.call(0, 0, hidden).kwargs)
    some = part(walk.call(0, 0, hidden), slice(1, 3), 3)
    alone = walk.block(0)(*some.args, **some.kwargs)
    first = [t if isinstance(t, torch.Tensor) else t[0] for t in (whole, alone)]
    torch.testing.assert_close(first[0][1:3], first[1])


class Skip(nn.Module):
    """Three blocks; the last hears the first again."""

    def __init__(self, calls=3):
        super().__init__()
        self.layers, self._calls = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), calls

    def forward(self, x):
        one = self.layers[0](x)
        two = self.layers[1](one)
        return self.layers[2](one + two) if self._calls == 3 else two


def test_what_cannot_be_walked_is_refused_by_name():
    given = Given({"x": torch.randn(3, 4)})
    with pytest.raises(QuantError, match=r"layers\.2 of Skip is not given what layers\.1 made"):
        Walk(Skip(), given)
    with pytest.raises(QuantError, match=r"layers\.2 of Skip is never called"):
        Walk(Skip(calls=2), given)
    tied = llama()
    tied.model.layers[1].mlp.up_proj.weight = tied.model.layers[0].mlp.up_proj.weight
    with pytest.raises(QuantError, match=r"model\.layers\.1 and model\.layers\.0 of LlamaForCausalLM share a weight"):
        Walk(tied, Given(IDS))
    with pytest.raises(QuantError, match="batches=0"):
        Walk(llama(), Given(IDS), 0)
    assert not any(block._forward_pre_hooks or block._forward_hooks for _, block in blocks(tied))


def test_the_configuration_is_as_it_was():
    model = llama().train()
    Walk(model, task(), 1)
    assert model.config.use_cache is True and model.training
