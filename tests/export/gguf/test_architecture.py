import json

import gguf
import pytest
import torch
from tiny_models import OWN, bert, checkpoint, model

from qatlas.core.error import FormatError
from qatlas.core.qtensor import QTensor
from qatlas.export.gguf import TARGETS, kept, logits, plan, read, write
from qatlas.export.gguf.architecture import KINDS, NAMES, ROWS


@pytest.mark.parametrize("name", OWN)
def test_the_gguf_package_gives_back_every_tensor(name, tmp_path):
    made = checkpoint(model(name), TARGETS["q4_0"])
    path = write(made, tmp_path / "m.gguf", "q4_0")
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert found == plan(made, "q4_0") and list(found.values()).count("Q4_0") == sum(isinstance(t, QTensor) for t in made.tensors.values()) > 0
    back = read(path)
    assert back.keys() == made.tensors.keys()
    for at, tensor in made.tensors.items():
        assert torch.equal(back[at], tensor.dequantize() if isinstance(tensor, QTensor) else kept(made.config, at, tensor)), at


@pytest.mark.parametrize("name", OWN)
def test_transformers_computes_the_same_logits_or_the_reason_is_said(name, tmp_path, tokenizer_dir):
    ours = model(name)
    path = write(checkpoint(ours, TARGETS["iq4_nl"], tokenizer_dir if not name.startswith("bert") else None), tmp_path / "m.gguf", "iq4_nl")
    prompts = [list(range(20)), list(range(40, 80))]
    theirs, reasons = logits(path, prompts), {"gemma": "no GGUF file", "bert": "no GGUF file", "bert classifier": "no GGUF file",
                                              "gemma2 other": "key_length 32", "gemma3 other": "rotary scaling"}
    if name in reasons:
        assert reasons[name] in theirs
        return
    assert torch.equal(theirs, torch.cat([ours(torch.tensor([prompt])).logits[:, -1] for prompt in prompts]))


def test_names_there_and_back():
    for row in ROWS:
        names = {row.to_gguf(f"{row.layers}.11.{part}.weight") for part in row.parts} | {row.to_gguf(f"{end}.weight") for end in row.ends}
        assert None not in names and len(names) == len(row.parts) + len(row.ends), row.name
        assert {row.to_gguf(row.to_hf(name, names)) for name in names} == names
        assert row.to_gguf("model.layers.0.self_attn.rotary.weight") is None and row.to_hf("blk.0.none.weight", names) is None
    assert NAMES["bert"].to_gguf("bert.encoder.layer.2.output.LayerNorm.bias") == "blk.2.layer_output_norm.bias"
    assert NAMES["gemma2"].to_gguf("model.layers.0.post_attention_layernorm.weight") == "blk.0.post_attention_norm.weight"
    assert NAMES["qwen2"].to_gguf("model.layers.0.post_attention_layernorm.weight") == "blk.0.ffn_norm.weight"


def test_gemmas_norms_come_back_as_what_the_model_computes_with():
    w = torch.cat([torch.randn(10_000) * s for s in (1e-6, 0.01, 1, 100)])
    back = NAMES["gemma2"].kept("model.norm.weight", w)
    assert torch.equal(1 + back, 1 + w) and not torch.equal(back, w)
    assert torch.equal(NAMES["gemma2"].kept("model.norm.weight", back), back)
    for row, name in ((NAMES["gemma2"], "model.layers.0.mlp.up_proj.weight"), (NAMES["qwen3"], "model.norm.weight")):
        assert torch.equal(row.kept(name, w), w)


def test_the_header_of_gemma3(tmp_path):
    reader = gguf.GGUFReader(write(checkpoint(model("gemma3 other")), tmp_path / "m.gguf", "f32"))
    said = {key: found.contents() for key, found in reader.fields.items()}
    wanted = {"general.architecture": "gemma3", "gemma3.attention.sliding_window": 8, "gemma3.rope.freq_base": 1e5, "gemma3.rope.freq_base_swa": 5e3,
              "gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 4.0, "gemma3.attention.key_length": 32}
    assert {key: said[key] for key in wanted} == wanted


def test_the_pooling_of_a_folder(tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    file = tmp_path / "1_Pooling" / "config.json"
    made = checkpoint(model("bert"), None, bert(tmp_path))
    file.write_text(json.dumps({"word_embedding_dimension": 256, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}))
    reader = gguf.GGUFReader(write(made, tmp_path / "m.gguf", "f32"))
    assert reader.get_field("bert.pooling_type").contents() == 1 and reader.get_field("bert.attention.causal").contents() is False
    rank = checkpoint(model("bert classifier"), None, tmp_path)
    reader = gguf.GGUFReader(write(rank, tmp_path / "c.gguf", "f32"))
    assert reader.get_field("bert.pooling_type").contents() == 4
    assert reader.get_field("bert.classifier.output_labels").contents() == ["LABEL_0", "LABEL_1", "LABEL_2"]
    file.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(FormatError, match="pooling_mode_max_tokens"):
        write(made, tmp_path / "n.gguf", "f32")


def test_positions_and_token_types_stay_f32():
    made = checkpoint(model("bert"), TARGETS["q8_0"])
    said = plan(made, "q8_0")
    assert said["token_embd.weight"] == "F16" and said["position_embd.weight"] == said["token_types.weight"] == "F32" and said["cls.weight"] == "F16"


def drop(end):
    def spoil(made):
        del made.tensors[next(name for name in made.tensors if name.endswith(end))]
    return spoil


def say(**changes):
    return lambda made: made.config.update(changes)


def far(kind):
    return {"full_attention": {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}


REFUSED = {
    "unknown": ("qwen2", say(model_type="mamba"), "'mamba'; it knows llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, bert"),
    "mistral's window": ("mistral", say(sliding_window=64), "max_position_embeddings=64"),
    "qwen2's window": ("qwen2", say(use_sliding_window=True), "use_sliding_window"),
    "qwen2's bias": ("qwen2", drop("k_proj.bias"), "missing blk.0.attn_k.bias"),
    "qwen3's bias": ("qwen3", say(attention_bias=True), "attention_bias"),
    "qwen3's norm": ("qwen3", drop("q_norm.weight"), "missing blk.0.attn_q_norm.weight"),
    "qwen2's rope": ("qwen2", say(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "'llama3' of qwen2"),
    "gemma's head": ("gemma2", say(tie_word_embeddings=False), "takes the embeddings as the head"),
    "gemma's activation": ("gemma2", say(hidden_activation="silu"), "hidden_activation"),
    "gemma2's layers": ("gemma2", say(layer_types=["full_attention"] * 2), "layer_types"),
    "gemma2's cap": ("gemma2", say(final_logit_softcapping=None), "caps its logits"),
    "gemma2's factor": ("gemma2", say(query_pre_attn_scalar=144), "query_pre_attn_scalar=256"),
    "gemma3's cap": ("gemma3", say(final_logit_softcapping=30.0), "final_logit_softcapping"),
    "gemma3 both ways": ("gemma3", say(use_bidirectional_attention=True), "use_bidirectional_attention"),
    "gemma3's rope": ("gemma3", say(rope_parameters=far("yarn")), "'yarn' of gemma3"),
    "gemma3's near rope": ("gemma3", say(rope_parameters={**far("default"), "sliding_attention": {"rope_type": "linear"}}), "with a window"),
    "bert's activation": ("bert", say(hidden_act="relu"), "hidden_act"),
    "bert as a decoder": ("bert", say(is_decoder=True), "is_decoder"),
    "bert without sizes": ("bert", lambda made: made.config.pop("type_vocab_size"), "type_vocab_size"),
    "a classifier of tokens": ("bert classifier", drop("pooler.dense.weight"), "missing cls.weight"),
    "masked words": ("bert", lambda made: made.tensors.update({"cls.predictions.bias": torch.zeros(310)}), "no tensor 'cls.predictions.bias'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_not_follow_is_refused(case, tmp_path):
    name, spoil, says = REFUSED[case]
    made = checkpoint(model(name, num_hidden_layers=2))
    spoil(made)
    with pytest.raises(FormatError, match=says):
        write(made, tmp_path / "m.gguf", "f32")
    assert not list(tmp_path.iterdir())


def test_the_large_gemmas_have_another_factor():
    made = checkpoint(model("gemma2"))
    made.config.update(num_hidden_layers=46, query_pre_attn_scalar=32, layer_types=["sliding_attention", "full_attention"] * 23)
    assert KINDS["gemma2"].numbers(made.config, set())["gemma2.block_count"] == 46
    made.config.update(query_pre_attn_scalar=256)
    with pytest.raises(FormatError, match="query_pre_attn_scalar=32"):
        KINDS["gemma2"].numbers(made.config, set())
