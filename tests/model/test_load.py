"""load: the zoo, directories, hub ids; fp32 masters; one clear error for each thing that can be wrong."""

import json

import pytest
import torch

from qatlas.core.error import CheckpointError
from qatlas.layers.packed import PackedLinear
from qatlas.model.load import load
from qatlas.model.pack import save

TASK = {"llama": "lm", "gpt2": "lm", "bert": "classification", "vit": "image", "resnet": "image"}


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", TASK)
def test_a_directory_in_full_precision(name, tiny, tmp_path):
    model = tiny.models[name]().eval()
    model.save_pretrained(tmp_path / "full")
    loaded, _ = load(tmp_path / "full", TASK[name])
    assert torch.equal(tiny.answer(loaded, name), tiny.answer(model, name)) and not loaded.training


def test_masters_are_fp32_whatever_the_file_holds(tiny, tmp_path):
    tiny.models["llama"]().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    loaded, tokenizer = load(str(tmp_path / "half"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32} and tokenizer is None


def test_a_packed_directory(tiny, tmp_path):
    model = tiny.made("llama")
    loaded, _ = load(save(model, tmp_path / "out"))
    assert isinstance(loaded.lm_head, PackedLinear) and torch.equal(tiny.answer(loaded, "llama"), tiny.answer(model, "llama"))
    with pytest.raises(CheckpointError, match="packed"):
        load(tmp_path / "out", num_hidden_layers=1)


def test_a_new_head_may_be_missing_and_a_body_may_not(tiny, tmp_path):
    tiny.models["bert"]().bert.save_pretrained(tmp_path / "body")
    assert load(tmp_path / "body", "classification", num_labels=5)[0].classifier.out_features == 5
    model = tiny.models["bert"]()
    state = {key: value for key, value in model.state_dict().items() if "layer.1.output.dense" not in key}
    model.save_pretrained(tmp_path / "hole", state_dict=state)
    with pytest.raises(CheckpointError, match="lacks 2 tensors"):
        load(tmp_path / "hole", "classification")
    tiny.models["bert"]().save_pretrained(tmp_path / "three")     # a head of three labels gives way to one of five when it is asked for
    assert load(tmp_path / "three", "classification", num_labels=5)[0].classifier.out_features == 5
    tiny.models["llama"](False).model.save_pretrained(tmp_path / "headless")
    with pytest.raises(CheckpointError, match="lm_head.weight"):
        load(tmp_path / "headless")


def test_a_tokenizer_that_cannot_be_read_is_not_passed_over(tiny, tmp_path):
    tiny.models["llama"]().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"has tokenizer.json"):
        load(tmp_path)


def broken(path, how):
    file = path / "model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    elif how == "pickle":
        file.unlink()
        torch.save({}, path / "pytorch_model.bin")
    elif how == "empty":
        file.unlink()
    elif how == "config":
        (path / "config.json").unlink()
    elif how == "json":
        (path / "config.json").write_text("{")
    else:
        config = json.loads((path / "config.json").read_text())
        config |= {"shape": {"hidden_size": 32}, "type": {"model_type": "nonsense"},
                   "foreign": {"quantization_config": {"quant_method": "aqlm"}}}[how]
        (path / "config.json").write_text(json.dumps(config))


BROKEN = {"truncated": "truncated", "pickle": "only pickle files", "empty": "no safetensors weights", "config": "found: generation_config.json",
          "json": "no JSON", "shape": "another shape, first .* in the model", "type": "nonsense", "foreign": "aqlm"}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_directory_is_one_clear_error(how, tiny, tmp_path):
    tiny.models["llama"]().save_pretrained(tmp_path)
    broken(tmp_path, how)
    with pytest.raises(CheckpointError, match=BROKEN[how]) as caught:
        load(tmp_path)
    assert len(str(caught.value)) < 800 and str(tmp_path) in str(caught.value)


def test_names_that_are_nothing(offline, tmp_path):
    for name, say in (("nobody/nothing", "nobody/nothing cannot be fetched"),
                      ("zoo:gtp", "nearest: gpt"), (tmp_path / "none", "there is no directory")):
        if str(name).startswith("zoo"):
            pytest.importorskip("qatlas.model.zoo")
        with pytest.raises(CheckpointError, match=say) as caught:
            load(name)
        assert len(str(caught.value)) < 800
    with pytest.raises(CheckpointError, match="nearest: image"):
        load(tmp_path, "images")


def test_the_zoo():
    pytest.importorskip("qatlas.model.zoo")
    model, tokenizer = load("zoo:gpt")
    assert tokenizer is not None and next(model.parameters()).dtype == torch.float32
    assert load("zoo:resnet", classes=7)[0].config.num_labels == 7
    with pytest.raises(CheckpointError, match="no argument 'clases'"):
        load("zoo:vit", clases=7)
