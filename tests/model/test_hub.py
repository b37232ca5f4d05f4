"""Loading through transformers' own Auto classes, in any type, with the scales as they were."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

from qatlas.core.error import CheckpointError
from qatlas.core.grain import Group
from qatlas.core.scale import AbsMax
from qatlas.core.scheme import weight
from qatlas.layers.store import Store
from qatlas.model.hub import Loader, QatlasConfig
from qatlas.model.pack import pack, save
from qatlas.model.rules import Rule, quantize

AUTO = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification,
        "vit": AutoModelForImageClassification, "resnet": AutoModelForImageClassification}
DTYPES = {"default": {}, "float32": {"dtype": torch.float32}, "bfloat16": {"dtype": torch.bfloat16},
          "float16": {"dtype": "float16"}, "auto": {"dtype": "auto"}}


def stores(model):
    return {f"{name}.{key}": tensor for name, part in model.named_modules() if isinstance(part, Store) for key, tensor in part.state_dict().items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", AUTO)
def test_auto_classes_load_what_was_saved(name, dtype, tiny, tmp_path):
    model = pack(tiny.made(name))
    path = save(model, tmp_path / "out")
    loaded = AUTO[name].from_pretrained(path, **DTYPES[dtype])
    assert type(loaded) is type(model)
    before, after = stores(model), stores(loaded)
    assert before.keys() == after.keys() and before
    assert all(torch.equal(tensor, after[key].to(tensor.dtype)) for key, tensor in before.items())
    kinds = {f"{name}.scale": getattr(torch, part.scale_dtype) for name, part in loaded.named_modules() if isinstance(part, Store)}
    assert all(after[key].dtype in (tensor.dtype, kinds.get(key)) for key, tensor in before.items()), "a scale as it is stored, all else as it was"
    if dtype in ("default", "float32", "auto"):
        assert torch.equal(tiny.answer(loaded, name), tiny.answer(model, name))
    elif name in ("llama", "gpt2", "bert"):                       # inputs of images would have to be cast too
        logits = tiny.answer(loaded, name)
        assert logits.dtype == DTYPES["bfloat16"]["dtype"] or dtype == "float16"
        assert torch.allclose(logits.float(), tiny.answer(model, name), atol=0.1)


@pytest.mark.parametrize("name", AUTO)
def test_save_pretrained_writes_it_again(name, tiny, tmp_path):
    model = pack(tiny.made(name))
    model.save_pretrained(tmp_path / "one")                       # packed here
    loaded = AUTO[name].from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")                      # packed when loaded
    again = AUTO[name].from_pretrained(tmp_path / "two")
    assert torch.equal(tiny.answer(again, name), tiny.answer(model, name))
    ours = save(model, tmp_path / "ours")
    assert (ours / "model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_a_bfloat16_model_stays_one(tiny, tmp_path):
    save(tiny.made("llama"), tmp_path / "out")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(tiny.answer(again, "llama"), tiny.answer(half, "llama"))
    assert all(torch.equal(tensor, stores(again)[key]) for key, tensor in stores(half).items())


def test_the_body_alone_and_sharded_files(tiny, tmp_path):
    model = pack(tiny.made("llama"))
    body = AutoModel.from_pretrained(save(model, tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(body(**tiny.batch("llama")).last_hidden_state, model.model(**tiny.batch("llama")).last_hidden_state)
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert torch.equal(tiny.answer(AutoModelForCausalLM.from_pretrained(tmp_path / "many"), "llama"), tiny.answer(model, "llama"))


def test_generation_and_gradients_of_scales(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save(tiny.made("llama"), tmp_path / "out"))
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape == (1, 7)
    model(**tiny.batch("llama"), labels=tiny.batch("llama")["input_ids"]).loss.backward()
    assert model.model.layers[0].mlp.up_proj.store.scale.grad.abs().sum() > 0


def test_scales_lie_as_they_are_stored_until_they_are_trained(tiny, tmp_path):
    model = quantize(tiny.models["llama"](), [Rule("*proj", weight=weight(4, Group(16)).but(scale=AbsMax(dtype="float16")))]).eval()
    save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    scale = loaded.model.layers[0].mlp.up_proj.store.scale
    held = scale.clone()
    assert held.dtype == torch.float16 and torch.equal(tiny.answer(loaded, "llama"), tiny.answer(model, "llama"))
    assert scale.dtype == torch.float16, "a forward without a graph leaves it"
    optimizer = torch.optim.SGD(loaded.parameters(), lr=1e-2)     # before the first forward with a graph
    loaded(**tiny.batch("llama"), labels=tiny.batch("llama")["input_ids"]).loss.backward()
    assert scale.dtype == scale.grad.dtype == torch.float32 and torch.equal(scale, held.float())
    optimizer.step()
    assert loaded.model.layers[0].mlp.up_proj.store.scale is scale and not torch.equal(scale, held.float())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").train()
    assert again.model.layers[0].mlp.up_proj.store.scale.dtype == torch.float32


def test_truncated_weights_are_one_clear_error(tiny, tmp_path):
    path = save(tiny.made("llama"), tmp_path / "out") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_config_is_no_way_to_quantize(tiny, tmp_path):
    tiny.models["llama"]().save_pretrained(tmp_path / "full")
    with pytest.raises(CheckpointError, match="quantize"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=QatlasConfig(layers={"lm_head": {}}))
    assert Loader(QatlasConfig(layers={"lm_head": {}}), pre_quantized=True).is_trainable


def test_importing_qatlas_registers_and_imports_no_model():
    code = ("import qatlas, sys; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'qatlas' in m; "
            "assert 'transformers.modeling_utils' not in sys.modules")
    source = os.pathsep.join(path for path in sys.path if path)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": source})
