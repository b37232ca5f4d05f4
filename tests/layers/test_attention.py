"""Our attention is each model's own, and quantizes what it is told to."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from qatlas.core.error import QuantError
from qatlas.core.grain import PerChannel, PerTensor, PerToken
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax
from qatlas.layers import attention

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
A8 = Quant(Uniform(8), PerToken(), AbsMax())
P8 = Quant(Uniform(8, False), PerToken(), AbsMax())
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SIZE)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, scale_attn_by_inverse_layer_idx=True)),
    "vit": lambda: ViTModel(ViTConfig(**{k: v for k, v in SIZE.items() if k != "vocab_size"}, image_size=16, patch_size=4)),
    "sliding window": lambda: MistralForCausalLM(MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=4)),
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZE, num_key_value_heads=2, head_dim=8, sliding_window=4, query_pre_attn_scalar=8)),
    "position bias": lambda: T5Model(T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64)),
}


def built(kind, **dtype):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    if kind == "vit":
        return model, {"pixel_values": torch.randn(2, 3, 16, 16)}
    ids, mask = torch.randint(1, 64, (2, 10)), torch.ones(2, 10, dtype=torch.long)
    mask[1, :3] = 0
    return model, {"input_ids": ids, "attention_mask": mask} | ({"decoder_input_ids": ids} if kind == "position bias" else {})


def answered(model, batch, implementation):
    model.set_attn_implementation(implementation)
    torch.manual_seed(1)
    return model(**batch)[0]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_it_is_the_models_own_attention(kind, mode):
    attention.register()
    model, batch = built(kind)
    model.train(mode == "train")                                   # the same dropout from the same seed
    own, ours = answered(model, batch, "eager"), answered(model, batch, attention.NAME)
    assert (own - ours).abs().max() <= 1e-6 * own.abs().max()
    switched = [m for m in model.modules() if attention.attends(m) and m.config._attn_implementation == attention.NAME]
    assert all(attention.AGREES in m.__dict__ for m in switched)


def test_half_precision_and_masks_of_booleans():
    attention.register()
    model, batch = built("llama")
    model.bfloat16()
    own, ours = answered(model, batch, "eager"), answered(model, batch, attention.NAME)
    assert ours.dtype == torch.bfloat16 and (own - ours).abs().max() < 2e-2 * own.abs().max()
    q, seen = torch.randn(1, 2, 4, 8), torch.ones(1, 1, 4, 4).tril().bool()
    module = nn.Module()
    module.__dict__[attention.AGREES] = True
    context, probs = attention.attention(module, q, q, q, seen)
    assert context.shape == (1, 4, 2, 8) and torch.equal(probs, probs.tril())
    assert torch.allclose(probs.sum(-1), torch.ones(1, 2, 4))


def test_an_attention_that_is_another_one_is_refused():
    attention.register()
    model = GptOssForCausalLM(GptOssConfig(**SIZE, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1)).eval()
    model.set_attn_implementation(attention.NAME)
    with pytest.raises(QuantError, match=r"GptOssAttention computes more than softmax.*sinks"):
        model(torch.arange(8)[None])


def test_each_quantizer_stands_where_it_says():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    module = nn.Module()
    module.__dict__[attention.AGREES] = True
    plain = attention.attention(module, q, k, v, None)[0]
    for signal in attention.QUANTIZED:
        attention.attach(module, {signal: P8 if signal == "probabilities" else A8})
    got, probs = attention.attention(module, q, k, v, None)
    wide_k, wide_v = (A8.hard(x).repeat_interleave(2, 1) for x in (k, v))
    expected = P8.hard((A8.hard(q) @ wide_k.mT * 8**-0.5).softmax(-1))
    assert torch.equal(probs, expected) and torch.equal(got, (expected @ wide_v).transpose(1, 2))
    assert 0 < (got - plain).abs().max() < 0.05
    assert probs.min() >= 0 and probs.max() <= 1 + 1e-6


def test_wrong_quants_say_what_to_write():
    assert attention.fitted("probabilities", Quant(Uniform(8, None), PerToken())).grid == Uniform(8, False)
    symmetric = Quant(Uniform(8, narrow=True), PerTensor())
    assert attention.fitted("probabilities", symmetric) == symmetric, "the grid of the literature, said aloud"
    for signal, quant, says in (("probabilities", A8, r"\[0, 1\].*Uniform\(8, False\)"), ("scores", A8, "scores has no quantizer"),
                                ("key", Quant(Uniform(8), PerChannel()), r"each sample of a batch.*PerChannel\(1\)")):
        with pytest.raises(QuantError, match=says):
            attention.fitted(signal, quant)


def test_gradients_go_through_quantizers_as_if_written_out():
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    module = nn.Module()
    module.__dict__[attention.AGREES] = True
    attention.attach(module, {signal: P8 if signal == "probabilities" else A8 for signal in attention.QUANTIZED})
    ours = torch.autograd.grad(attention.attention(module, *tensors, None)[0].square().sum(), tensors)
    q, k, v = (getattr(module, f"{s}_quantizer")(x) for s, x in zip(("query", "key", "value"), tensors, strict=True))
    context = module.probabilities_quantizer((q @ k.mT * 8**-0.5).softmax(-1)) @ v
    theirs = torch.autograd.grad(context.square().sum(), tensors)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, theirs, strict=True))
