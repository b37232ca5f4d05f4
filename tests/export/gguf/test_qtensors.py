"""GGUF in the other direction: what we wrote, what the gguf package wrote, and random bytes, as QTensors, bit for bit; what is wrong is refused."""

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from by_package import file as by_package
from tiny_llama import TEXT, checkpoint, llama

from qatlas.core.error import FormatError
from qatlas.core.qtensor import QTensor
from qatlas.export.gguf import TARGETS, config, holds, qtensors, read, tokenizer, write
from qatlas.export.gguf.architecture import LARGE
from qatlas.model import foreign

BLOCKS = [name for name, quant in TARGETS.items() if quant is not None]
SMALL = {"num_hidden_layers": 1}


def values(tensors):
    return {name: t.dequantize() if isinstance(t, QTensor) else t.float() for name, t in tensors.items()}


def equal(ours, theirs):
    return set(ours) == set(theirs) and all(torch.equal(t, theirs[name]) for name, t in ours.items())


def blocks(path):
    return {t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", BLOCKS)
def test_what_we_wrote_comes_back_and_is_written_again(kind, tmp_path):
    model = llama(**SMALL, tied=kind == "q4_0")
    made = checkpoint(model, TARGETS[kind])
    path = write(made, tmp_path / "m.gguf", kind)
    found = qtensors(path)
    assert holds(path) and equal(values(found), read(path)) and sum(isinstance(t, QTensor) for t in found.values()) == 7
    said = config(path)
    assert said["tie_word_embeddings"] == (kind == "q4_0")
    made.tensors, made.config = found, said
    assert blocks(write(made, tmp_path / "again.gguf", kind)) == blocks(path)


@pytest.mark.parametrize("kind", [name.upper() for name in BLOCKS])
def test_what_the_package_quantized_comes_back(kind, tmp_path):
    path = by_package(tmp_path / "m.gguf", llama(**SMALL), kind)
    found = qtensors(path)
    assert equal(values(found), read(path)) and sum(isinstance(t, QTensor) for t in found.values()) == 7


OTHERS = [name for name in tiny_models.OWN if not name.startswith("bert")]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", ["q4_0", "q5_1"])
def test_other_architectures_come_back_and_are_written_again(kind, name, tmp_path):
    made = tiny_models.checkpoint(tiny_models.model(name), TARGETS[kind])
    path = write(made, tmp_path / "m.gguf", kind)
    found = qtensors(path)
    assert equal(values(found), read(path)) and found.keys() == made.tensors.keys()
    assert sum(isinstance(t, QTensor) for t in found.values()) == 7 * made.config["num_hidden_layers"]
    made.tensors, made.config = found, config(path)
    assert blocks(write(made, tmp_path / "again.gguf", kind)) == blocks(path)
    before, after = (gguf.GGUFReader(tmp_path / each).fields for each in ("m.gguf", "again.gguf"))
    assert {key: f.contents() for key, f in before.items()} == {key: f.contents() for key, f in after.items()}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_start_as_the_model_that_was_written(name, tmp_path):
    """Not only its tensors: the same logits, so that no number of the config is lost; codes stay codes."""
    model = tiny_models.model(name)
    path = write(tiny_models.checkpoint(model, TARGETS["q8_0"]), tmp_path / "m.gguf", "q8_0")
    ids = torch.arange(80).reshape(2, 40)                         # longer than the windows
    with torch.no_grad():
        ours, packed, whole = (m(input_ids=ids).logits for m in (model, foreign.load(path), foreign.whole(path)))
    assert torch.equal(ours, whole) and torch.equal(ours, packed)
    said, own = config(path), model.config.to_dict()
    skipped = {"architectures", "model_type", "hidden_act", "pad_token_id"}
    assert {key: (value, own[key]) for key, value in said.items() if key in own and key not in skipped and own[key] != value} == {}


def test_the_large_gemmas_factor_of_q(tmp_path):
    """The 27B sizes are told by their layers."""
    for name, layers in LARGE.items():
        model = tiny_models.model(name, num_hidden_layers=layers, head_dim=32, query_pre_attn_scalar=32, hidden_size=64, num_attention_heads=2)
        made = tiny_models.checkpoint(model)
        said = config(write(made, tmp_path / f"{name}.gguf", "f32"))
        assert said["query_pre_attn_scalar"] == 32 and said["layer_types"] == made.config["layer_types"]
        made = tiny_models.checkpoint(tiny_models.model(name, num_hidden_layers=layers, head_dim=16, query_pre_attn_scalar=32))
        assert config(write(made, tmp_path / f"{name}-16.gguf", "f32"))["query_pre_attn_scalar"] == 32


def test_what_other_architectures_say_and_we_do_not_read(tmp_path):
    def spoiled(name, key, value):
        path = write(tiny_models.checkpoint(tiny_models.model(name)), tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf", "f32")
        return by_package_with(path, tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf", {key: value})

    assert "'yarn'; of qwen2 qatlas reads none and linear" in refused(spoiled("qwen2", "qwen2.rope.scaling.type", "yarn"))
    assert "'linear'; of gemma2 qatlas reads none" in refused(spoiled("gemma2", "gemma2.rope.scaling.type", "linear"))
    assert "sliding_window_pattern 4" in refused(spoiled("gemma3", "gemma3.attention.sliding_window_pattern", 4))
    assert "caps its logits at 30.0" in refused(spoiled("gemma3", "gemma3.final_logit_softcapping", 30.0))
    assert "8 experts" in refused(spoiled("qwen3", "qwen3.expert_count", 8))
    assert "gemma2.attention.sliding_window = 0" in refused(spoiled("gemma2", "gemma2.attention.sliding_window", 0))
    path = write(tiny_models.checkpoint(tiny_models.model("bert")), tmp_path / "bert.gguf", "f32")
    assert "'bert'; training can start from llama, qwen2" in refused(path)


def by_package_with(path, to, keys):
    """The file again, with other numbers in its header."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(to, reader.get_field("general.architecture").contents())
    said = {key: found.contents() for key, found in reader.fields.items() if not key.startswith("GGUF.") and key != "general.architecture"}
    for key, value in {**said, **keys}.items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}.get(type(value), lambda *_: None)(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


def test_the_config_is_that_of_the_model(tmp_path):
    model = llama(head_dim=128, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5, rope_parameters={"rope_type": "linear", "factor": 4.0,
                  "rope_theta": 500000.0}, **SMALL)
    said = config(write(checkpoint(model, TARGETS["q8_0"]), tmp_path / "m.gguf", "q8_0"))
    own = model.config.to_dict()
    assert {key: (value, own[key]) for key, value in said.items() if key != "architectures" and own[key] != value} == {}


def test_the_config_agrees_with_transformers_where_that_has_an_answer(tmp_path):
    from transformers import AutoConfig

    path = by_package(tmp_path / "m.gguf", llama(), "Q8_0", head=False, keys={"tokenizer.ggml.model": "none", "general.name": "tiny"}.items())
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf").to_dict()
    ours = config(path)
    assert ours["tie_word_embeddings"] and theirs["tie_word_embeddings"]
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"):
        assert ours[key] == theirs[key]
    assert ours["rms_norm_eps"] == pytest.approx(theirs["rms_norm_eps"])


@pytest.mark.parametrize("factor", [8.0, 32.0, 16.0])
def test_the_scaling_of_llama_3_is_found_by_its_factors(factor, tmp_path):
    scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    model = llama(rope_parameters=scaling, **SMALL)
    assert config(write(checkpoint(model, TARGETS["q8_0"]), tmp_path / "m.gguf", "q8_0"))["rope_parameters"] == scaling


@pytest.mark.parametrize("kind", ["tokenizer_dir", "sentences_dir", None])
def test_the_tokenizer_of_the_header_gives_the_same_ids(kind, request, tmp_path):
    from transformers import AutoTokenizer

    folder = None if kind is None else request.getfixturevalue(kind)
    path = write(checkpoint(llama(vocab_size=330, **SMALL), TARGETS["q8_0"], folder), tmp_path / "m.gguf", "q8_0")
    if kind is None:
        assert tokenizer(path) is None
        return
    own, found = AutoTokenizer.from_pretrained(folder), tokenizer(path)
    assert [own(text)["input_ids"] for text in TEXT] == [found(text)["input_ids"] for text in TEXT]


def test_a_vocabulary_that_cannot_be_read_is_refused(tmp_path):
    path = by_package(tmp_path / "m.gguf", llama(**SMALL), "Q8_0", keys={"tokenizer.ggml.model": "nobodys", "general.name": "x"}.items())
    with pytest.raises(FormatError, match="kind 'nobodys'"):
        tokenizer(path)


def refused(path):
    with pytest.raises(FormatError) as caught:
        qtensors(path)
        config(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_what_has_no_form_is_refused_by_name(tmp_path):
    small = llama(**SMALL)
    path = by_package(tmp_path / "a.gguf", small, "Q8_0", extra={"rope_freqs.weight": np.linspace(1, 3, 32, dtype=np.float32)})
    assert "no published scaling" in refused(path)
    assert "one of 3 files" in refused(by_package(tmp_path / "b.gguf", small, "Q8_0", keys={"split.count": 3}.items()))
    assert "8 experts" in refused(by_package(tmp_path / "c.gguf", small, "Q8_0", keys={"llama.expert_count": 8}.items()))
    assert "'yarn'" in refused(by_package(tmp_path / "d.gguf", small, "Q8_0", keys={"llama.rope.scaling.type": "yarn"}.items()))
    assert "blk.0.other.weight" in refused(by_package(tmp_path / "e.gguf", small, "Q8_0", extra={"blk.0.other.weight": np.zeros(4, np.float32)}))
    assert "head_count = 0" in refused(by_package(tmp_path / "f.gguf", small, "Q8_0", keys={"llama.attention.head_count": 0}.items()))
    assert "7 heads" in refused(by_package(tmp_path / "g.gguf", small, "Q8_0", keys={"llama.attention.head_count": 7}.items()))
    assert "of type I32" in refused(by_package(tmp_path / "h.gguf", small, "Q8_0", extra={"output_norm.bias": np.zeros(256, np.int32)}))


@pytest.mark.parametrize("kind, say", [("IQ4_XS", "IQ4_XS, whose values are no grid"), ("TQ2_0", "fourth value"), ("Q4_0", "NaN or infinite")])
def test_codes_and_steps_without_a_meaning_are_refused(kind, say, tmp_path):
    path = by_package(tmp_path / "m.gguf", llama(**SMALL), "Q4_K" if kind == "IQ4_XS" else kind)
    data = bytearray(path.read_bytes())
    reader = gguf.GGUFReader(path)
    at = next(t for t in reader.tensors if t.name == "blk.0.attn_v.weight")
    if kind == "IQ4_XS":                                          # the type's number in the tensor's info; its blocks are no longer than Q4_K's
        info = data.find(b"blk.0.attn_v.weight") + len(b"blk.0.attn_v.weight") + 4 + 16
        assert data[info] == 12
        data[info] = 23
    else:
        data[at.data_offset : at.data_offset + 2] = b"\xff\xff"
    path.write_bytes(data)
    assert say in refused(path)


@pytest.mark.parametrize("cut", [3, 40, 2000, -1000])
def test_a_truncated_file_is_refused(cut, tmp_path):
    path = by_package(tmp_path / "m.gguf", llama(**SMALL), "Q4_K")
    path.write_bytes(path.read_bytes()[:cut])
    assert holds(path) == (cut != 3) and not holds(tmp_path)
    refused(path)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "model.gguf")
    assert not holds(tmp_path / "model.gguf") and not holds(tmp_path) and not holds(tmp_path / "absent.gguf")
