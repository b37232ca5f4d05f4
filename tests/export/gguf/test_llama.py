import pytest
import torch

from qatlas.core.error import FormatError
from qatlas.export.gguf import llama

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


def test_names_there_and_back():
    ours = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", *(f"model.layers.11.{part}.weight" for part in llama.PARTS)]
    assert [llama.to_hf(llama.to_gguf(name)) for name in ours] == ours
    assert llama.to_gguf("model.layers.0.self_attn.rotary") is None and llama.to_gguf("score.weight") is None
    assert llama.to_hf("rope_freqs.weight") is None


@pytest.mark.parametrize("heads, size", [(4, 64), (2, 2), (1, 8)])
def test_unpermute_undoes_permute(heads, size):
    rows = torch.randn(heads * size, 3)
    assert torch.equal(llama.unpermute(llama.permute(rows, heads), heads), rows)


def test_rotary_keys_old_and_new():
    assert llama.rotary({"rope_theta": 5e5}) == {"llama.rope.freq_base": 5e5}
    assert llama.rotary({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}})["llama.rope.scaling.factor"] == 2.0
    with pytest.raises(FormatError, match="dynamic"):
        llama.rotary({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 8}})


def test_llama3_frequencies_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=LLAMA3)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / LLAMA3["rope_theta"] ** (torch.arange(0, 64, 2) / 64)
    factors = llama.rotary_factors(config.to_dict())
    assert torch.allclose(plain / factors, theirs, rtol=1e-6) and factors[0] == 1 and factors[-1] == 8
    assert llama.rotary_factors({"rope_theta": 1e4}) is None
