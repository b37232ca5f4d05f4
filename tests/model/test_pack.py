"""Packed models: bit exact through pack, save and load; and every kind of broken directory is one clear error that changes nothing."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qatlas.core.error import CheckpointError, QuantError
from qatlas.core.grain import PerChannel, PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.qtensor import QTensor
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, Learned, MinMax
from qatlas.core.scheme import scheme, weight
from qatlas.core.transform import Hadamard, Smooth
from qatlas.layers.adapter import Lora
from qatlas.layers.packed import Packed
from qatlas.model.pack import checkpoint, load_into, load_packed, pack, save
from qatlas.model.rules import Rule, quantize

ALL = ["llama", "gpt2", "bert", "vit", "resnet", "plain"]


def qtensors(model):
    return {name: layer.qtensor() for name, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, Packed)}


def equal(a: QTensor, b: QTensor) -> bool:
    return (torch.equal(a.codes, b.codes) and torch.equal(a.steps, b.steps) and (a.grid, a.grain, a.scale_dtype) == (b.grid, b.grain, b.scale_dtype)
            and all((x is None and y is None) or torch.equal(x, y) for x, y in ((a.zero, b.zero), (a.offsets, b.offsets))))


def back(path, name, tiny):
    if name != "plain":
        return load_packed(path)
    torch.manual_seed(1)
    return load_into(tiny.models["plain"](), path)


@pytest.mark.parametrize("name", ALL)
def test_packed_saved_and_loaded_is_bit_exact(name, tiny, tmp_path):
    model = tiny.made(name)
    before = tiny.answer(model, name)
    assert torch.equal(tiny.answer(pack(model), name), before)
    path = save(model, tmp_path / "out")
    loaded = back(path, name, tiny)
    assert torch.equal(tiny.answer(loaded, name), before) and not loaded.training
    ours, theirs = qtensors(model), qtensors(loaded)
    assert ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    again = back(save(loaded, tmp_path / "again"), name, tiny)
    assert torch.equal(tiny.answer(again, name), before)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


def test_a_trainable_model_is_saved_without_being_changed(tiny, tmp_path):
    model = tiny.made("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = load_packed(save(model, tmp_path / "out"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()) and len(before) == len(model.state_dict())
    assert torch.equal(tiny.answer(loaded, "llama"), tiny.answer(model, "llama"))


def test_tied_weights_share_one_store_and_are_written_once(tiny, tmp_path):
    model = pack(tiny.made("llama"))
    assert model.lm_head.store is model.model.embed_tokens.store
    path = save(model, tmp_path / "out")
    names = load_file(path / "model.safetensors")
    assert "model.embed_tokens.store.codes" in names and "lm_head.store.codes" not in names
    loaded = load_packed(path)
    assert loaded.lm_head.store is loaded.model.embed_tokens.store
    torch.manual_seed(0)
    untied = pack(tiny.quantized(tiny.models["llama"](False)))
    assert untied.lm_head.store is not untied.model.embed_tokens.store


def test_tied_in_full_precision_stays_tied(tiny, tmp_path):
    model = pack(tiny.made("llama", only="layers"))
    loaded = load_packed(save(model, tmp_path / "out"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(tiny.answer(loaded, "llama"), tiny.answer(model, "llama"))


def test_only_one_of_two_tied_layers_packed(tiny, tmp_path):
    model = pack(tiny.made("llama", only="embed"))
    loaded = load_packed(save(model, tmp_path / "out"))
    assert isinstance(loaded.model.embed_tokens, Packed) and isinstance(loaded.lm_head, nn.Linear)
    assert torch.equal(tiny.answer(loaded, "llama"), tiny.answer(model, "llama"))


def slots(kind, tiny):
    """Each with something of its own in the file."""
    w4, a8 = weight(4), Quant(weight(8).grid, scale=AbsMax())
    group = weight(4).but(grain=tiny.group(32))
    static = a8.but(grain=PerTensor(), scale=Learned(AbsMax()))
    return {"group": tiny.Slots(weight=group), "learned": tiny.Slots(weight=w4.but(scale=Learned(AbsMax()))),
            "hadamard": tiny.Slots(weight=w4, transform=Hadamard()), "smooth": tiny.Slots(weight=w4, transform=Smooth()),
            "inside": tiny.Slots(weight=w4, adapter=Lora(4)), "beside": tiny.Slots(weight=w4, adapter=Lora(4, place="beside")),
            "after": tiny.Slots(weight=w4, adapter=Lora(4, place="after")), "static": tiny.Slots(weight=w4, input=static),
            "input": tiny.Slots(input=static), "fp8": tiny.Slots(weight=w4.but(scale=AbsMax(dtype="float8_e8m0fnu"))),
            "nested": tiny.Slots(weight=group.but(scale=AbsMax(nested=a8))),
            "nested offset": tiny.Slots(weight=group.but(scale=Learned(MinMax("offset"), nested=a8, offset_nested=a8)))}[kind]


@pytest.mark.parametrize("kind", ["group", "learned", "hadamard", "smooth", "inside", "beside", "after", "static", "input", "fp8", "nested",
                                  "nested offset"])
def test_everything_a_layer_can_have_survives(kind, tiny, tmp_path):
    torch.manual_seed(0)
    model = tiny.models["llama"]().eval()
    what = slots(kind, tiny)
    if kind == "smooth":
        from qatlas.layers.linear import QLinear
        for layer in model.model.layers:
            layer.mlp.up_proj = QLinear.of(layer.mlp.up_proj, what, torch.rand(64) + 0.5)
    else:
        tiny.quantized(model, what, only="mlp")
    for module in model.modules():
        if isinstance(getattr(module, "b", None), nn.Parameter):
            nn.init.normal_(module.b)                             # a fresh LoRA adds nothing
        quantizer = getattr(module, "input_quantizer", None)
        if quantizer is not None and not quantizer.ready:
            quantizer.initialise(torch.tensor([0.7, -1.3]))
    before = tiny.answer(model, "llama")
    loaded = load_packed(save(pack(model), tmp_path / "out"))
    assert torch.equal(tiny.answer(loaded, "llama"), before)
    half = load_packed(tmp_path / "out", dtype=torch.bfloat16)    # runs, and its scales are the same
    assert tiny.answer(half, "llama").isfinite().all()
    assert all(equal(q, qtensors(half)[name]) for name, q in qtensors(loaded).items())


def test_scales_are_stored_in_their_type_and_never_at_a_loss(tiny, tmp_path):
    model = pack(tiny.made("llama"))
    key = "model.layers.0.mlp.up_proj.store.scale"
    assert load_file(save(model, tmp_path / "a") / "model.safetensors")[key].dtype == torch.float16
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.store.scale.mul_(1.0001)
    assert load_file(save(model, tmp_path / "b") / "model.safetensors")[key].dtype == torch.float32
    assert torch.equal(tiny.answer(load_packed(tmp_path / "b"), "llama"), tiny.answer(model, "llama"))


def test_config_says_what_was_done(tiny, tmp_path):
    config = json.loads((save(tiny.made("llama"), tmp_path / "out") / "config.json").read_text())
    own = config["quantization_config"]
    assert (own["quant_method"], own["version"], own["dtype"]) == ("qatlas", 1, "float32")
    assert own["layers"]["lm_head"]["tied"] == "model.embed_tokens" and config["architectures"] == ["LlamaForCausalLM"]


def test_rules_travel_with_the_model(tiny, tmp_path):
    from qatlas.core.noun import from_json
    from qatlas.model.rules import Role, Rule, keep_full, quantize
    rules = [*keep_full(Role.HEAD), Rule("*.mlp.*", weight=weight(4)), Rule("*.self_attn.*", weight=weight(8).but(grain=tiny.group(32)))]
    model = quantize(tiny.models["llama"]().eval(), rules)
    loaded = load_packed(save(pack(model), tmp_path / "out"))
    again = load_packed(save(loaded, tmp_path / "again"))
    assert from_json(again.config.quantization_config.rules) == tuple(rules)
    assert torch.equal(tiny.answer(again, "llama"), tiny.answer(model, "llama"))


def test_a_failing_write_leaves_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("qatlas.model.pack.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(tiny.made("plain"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_checkpoint_speaks_hugging_face(tiny):
    pytest.importorskip("qatlas.export.checkpoint")
    for name in ("llama", "gpt2", "resnet"):
        model = tiny.made(name)
        twice = [checkpoint(model), checkpoint(pack(model))]
        assert "quantization_config" not in twice[1].config
        assert twice[0].tensors.keys() == twice[1].tensors.keys()
        names = set(tiny.models[name]().state_dict()) - {"lm_head.weight"}
        assert set(twice[0].tensors) == names
    got = checkpoint(tiny.made("llama")).tensors["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(got, QTensor) and got.shape == (64, 64)
    with pytest.raises(QuantError, match="transform"):
        checkpoint(tiny.made("llama", tiny.Slots(weight=weight(4), transform=Hadamard()), only="mlp"))


def test_a_taken_path_and_a_plain_model_are_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("x")
    model = tiny.made("plain")
    with pytest.raises(CheckpointError, match="not an empty directory"):
        save(model, tmp_path)
    with pytest.raises(QuantError, match="no quantized layer"):
        save(nn.Linear(2, 2), tmp_path / "new")
    with pytest.raises(CheckpointError, match="no tokenizer files"):
        save(model, tmp_path / "new", tokenizer=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]   # nothing half written


def test_tokenizer_files_come_along(tiny, tmp_path):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text("{}")
    assert (save(tiny.made("plain"), tmp_path / "out", tokenizer=tmp_path / "tok") / "tokenizer.json").read_text() == "{}"


def edit(path, **changes):
    file = path / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        (config["quantization_config"] if key in ("version", "quant_method", "layers", "news") else config)[key] = value
    file.write_text(json.dumps(config))


def spoil(path, how):
    file = path / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.0.mlp.up_proj.store.codes"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "header":
        file.write_bytes(struct.pack("<Q", 10**9) + b"{}")
    elif how == "missing":
        save_file({k: v for k, v in tensors.items() if k != key}, file, {"format": "pt"})
    elif how == "extra":
        save_file(tensors | {"spare": torch.zeros(1)}, file, {"format": "pt"})
    elif how == "shape":
        save_file(tensors | {key: tensors[key][:, 1:].contiguous()}, file, {"format": "pt"})
    elif how == "type":
        save_file(tensors | {key: tensors[key].float()}, file, {"format": "pt"})
    elif how == "pickle":
        file.unlink()
        torch.save(tensors, path / "pytorch_model.bin")
    elif how == "gone":
        file.unlink()
    elif how == "config":
        (path / "config.json").unlink()
    elif how == "json":
        (path / "config.json").write_text("{")
    elif how == "version":
        edit(path, version=2)
    elif how == "news":
        edit(path, news=1)
    elif how == "foreign":
        edit(path, quant_method="gptq")
    elif how == "layers":
        edit(path, layers={})
    elif how == "width":
        edit(path, hidden_size=32)
    elif how == "depth":
        edit(path, num_hidden_layers=1)
    elif how == "class":
        layers = json.loads((path / "config.json").read_text())["quantization_config"]["layers"]
        layers["model.layers.0.mlp.up_proj"]["layer"] = "Evil"
        edit(path, layers=layers)


BROKEN = {"truncated": "truncated", "header": "truncated", "missing": "1 missing: model.layers.0.mlp.up_proj.store.codes",
          "extra": "1 superfluous: spare", "shape": "of another shape", "type": "not U8", "pickle": "pickle files are never opened",
          "gone": "no model.safetensors",
          "config": "no config.json", "json": "no JSON", "version": "version 2", "news": "with news", "foreign": "'gptq'",
          "layers": "no layers", "width": "in the model", "depth": "lacks", "class": "Evil"}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_directory_is_one_clear_error(how, tiny, tmp_path):
    path = save(tiny.made("llama"), tmp_path / "out")
    spoil(path, how)
    with pytest.raises(CheckpointError, match=BROKEN[how]):
        load_packed(path)
    if how not in ("width", "depth"):                             # those edit the config that load_packed builds the model from
        model = tiny.models["llama"]()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=BROKEN[how]):
            load_into(model, path)
        assert before.keys() == model.state_dict().keys() and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_of_ones_own_asks_for_load_into(tiny, tmp_path):
    path = save(tiny.made("plain"), tmp_path / "out")
    with pytest.raises(CheckpointError, match="load_into"):
        load_packed(path)
    with pytest.raises(CheckpointError, match="in the model"):
        load_into(tiny.models["plain"](32), path)


@pytest.mark.parametrize("more", [{}, {"weight": None}])
def test_one_static_step_a_feature_comes_back(more, tmp_path):
    """Their number is the layer's width, which the Quant does not say."""
    def made():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))

    model, x = made(), torch.randn(16, 8)
    features = Quant(Uniform(8), PerChannel(-1), Learned(AbsMax()))
    quantize(model, [Rule("0", **({"weight": scheme("w4").weight, "input": features} | more))])
    model[0].input_quantizer.observe()
    model(x)
    model[0].input_quantizer.settle()
    save(model, tmp_path / "out")
    assert torch.equal(load_into(made(), tmp_path / "out")(x), model(x))
