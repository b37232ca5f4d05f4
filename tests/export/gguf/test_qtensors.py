"""GGUF in the other direction: what we wrote, what the gguf package wrote, and random bytes, as QTensors, bit for bit; what is wrong is refused."""

import gguf
import numpy as np
import pytest
import torch
from by_package import file as by_package
from tiny_llama import TEXT, checkpoint, llama

from qatlas.core.error import FormatError
from qatlas.core.qtensor import QTensor
from qatlas.export.gguf import TARGETS, config, holds, qtensors, read, tokenizer, write

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
