"""Models in training through transformers: asked for by a quantization_config, saved with masters and scales, trained by a real Trainer, packed."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import qatlas
from qatlas import QatlasCallback, QatlasConfig
from qatlas.core.error import CheckpointError, FormatError, QuantError, RuleError, RunError
from qatlas.core.grain import PerToken
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scheme import weight
from qatlas.core.transform import Hadamard
from qatlas.layers.adapter import Lora
from qatlas.layers.norm import Norm
from qatlas.layers.packed import Packed
from qatlas.layers.quantized import Quantized
from qatlas.model.load import load
from qatlas.model.pack import load_into, pack
from qatlas.model.quantized import quantizers
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.train.calibrate import calibrate_on

AUTO = {"gpt2": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification, "vit": AutoModelForImageClassification}
README = Path(__file__).parents[2] / "README.md"
ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(1, 128, (8, 12), generator=torch.Generator().manual_seed(1))]


@pytest.fixture
def full(tiny, tmp_path):
    torch.manual_seed(0)
    tiny.models["llama"]().save_pretrained(tmp_path / "full")
    return tmp_path / "full"


def asked(full, *args, **kwargs):
    return AutoModelForCausalLM.from_pretrained(full, quantization_config=QatlasConfig(*args, **kwargs))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(t, b[name]) and t.dtype == b[name].dtype for name, t in a.items())


def arguments(path, **changes):
    usual = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "save_steps": 2, "logging_steps": 1, "report_to": [],
             "use_cpu": True, "disable_tqdm": True, "weight_decay": 0.1}
    return TrainingArguments(str(path), **usual | changes)


def trainer(model, path, *callbacks, **changes):
    return Trainer(model, arguments(path, **changes), train_dataset=ROWS, callbacks=list(callbacks))


def test_a_quantization_config_gives_the_model_that_quantize_gives(full, tiny):
    model = asked(full, "w4-g32", target="gguf:q4_0")
    by_hand = quantize(AutoModelForCausalLM.from_pretrained(full), "w4-g32", target="gguf:q4_0")
    assert same(model, by_hand) and torch.equal(tiny.answer(model, "llama"), tiny.answer(by_hand, "llama"))
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, Quantized) and layer.slots.weight.scale.dtype == "float16" and layer.weight.requires_grad
    assert layer.weight_quantizer.scale.shape == (96, 2)
    assert layer.weight_quantizer.scale.unique().numel() > 10     # started from the weights that were loaded
    assert model.hf_quantizer.is_qat_trainable and repr(model.config.quantization_config).startswith("QatlasConfig(14 trainable layers")
    assert not any(module.training for module in model.modules())
    listed = asked(full, [*keep_full("@embedding", "@head"), Rule("*", weight=weight(4, tiny.group(32)))], target="gguf:q4_0")
    assert same(listed, model)


def test_masters_are_fp32_whatever_the_file_holds_or_the_user_asks(full, tiny, tmp_path):
    with pytest.warns(UserWarning, match="loaded in float32, not in bfloat16"):
        model = AutoModelForCausalLM.from_pretrained(full, quantization_config=QatlasConfig("w4"), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and same(model, asked(full, "w4"))
    model.save_pretrained(tmp_path / "out")
    with pytest.warns(UserWarning, match="float32"):
        assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float16"), model)


EVERYTHING = {
    "groups": "w2a8-g32",
    "one bit": "w1",
    "tied": [Rule("*", weight=weight(4))],
    "input alone": [*keep_full("@embedding", "@head"), Rule("*", weight=None, input=Quant(Uniform(8), PerToken()))],
    "parts": [*keep_full("@embedding", "@head"), Rule("*up_proj", weight=weight(4), transform=Hadamard(block=32, seed=3)),
              Rule("*q_proj", weight=weight(4), adapter=Lora(rank=2)), Rule("*down_proj", weight=weight(4), norm=Norm(), keep="buffer"),
              Rule("*", weight=weight(3))],
    "signals": [*keep_full("@embedding", "@head"), Rule("@attention:key", signal=Quant(Uniform(8), PerToken())), Rule("*", weight=weight(4))],
}


@pytest.mark.parametrize("kind", EVERYTHING)
def test_a_model_in_training_comes_back_bit_for_bit(kind, full, tiny, tmp_path):
    model = asked(full, EVERYTHING[kind])
    with torch.no_grad():                                         # as training would: nothing is where measuring it again would find it
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01 * parameter.abs().mean())
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(again, model) and torch.equal(tiny.answer(again, "llama"), tiny.answer(model, "llama"))
    assert {n: q.quant for n, q in quantizers(again).items()} == {n: q.quant for n, q in quantizers(model).items()}
    assert again.qatlas_rules == model.qatlas_rules and again.qatlas_full == model.qatlas_full
    assert [m.slots for m in again.modules() if isinstance(m, Quantized)] == [m.slots for m in model.modules() if isinstance(m, Quantized)]
    assert all(p.requires_grad for p in again.parameters())
    ours, tokenizer = load(tmp_path / "out")
    assert same(ours, model) and tokenizer is None
    again.save_pretrained(tmp_path / "two")
    assert (tmp_path / "two/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "two/config.json").read_text()) == json.loads((tmp_path / "out/config.json").read_text())


def test_tied_layers_share_their_quantizer_after_loading(full, tmp_path):
    asked(full, EVERYTHING["tied"]).save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.lm_head.weight_quantizer is again.model.embed_tokens.weight_quantizer is not None


def test_the_body_alone_and_sharded_files(full, tiny, tmp_path):
    model = asked(full, "w4")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "many"), model)
    assert same(AutoModel.from_pretrained(tmp_path / "many"), model.model)


def test_a_new_head_is_initialised_as_ever(tiny, tmp_path):
    tiny.models["bert"]().bert.save_pretrained(tmp_path / "body")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "body", num_labels=5, quantization_config=QatlasConfig("w4"))
    assert type(model.classifier) is torch.nn.Linear and 0.01 < model.classifier.weight.std() < 0.03


@pytest.mark.parametrize("name", AUTO)
def test_other_families(name, tiny, tmp_path):
    tiny.models[name]().save_pretrained(tmp_path / "full")
    model = AUTO[name].from_pretrained(tmp_path / "full", quantization_config=QatlasConfig("w4a8"))
    model.save_pretrained(tmp_path / "out")
    again = AUTO[name].from_pretrained(tmp_path / "out")
    assert same(again, model) and torch.equal(tiny.answer(again, name), tiny.answer(model, name))


class Watch(TrainerCallback):
    """Notes the groups of the optimizer while it steps, and between steps."""

    def __init__(self):
        self.inside, self.outside = [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        self.inside = [(len(g["params"]), g["weight_decay"], g["lr"]) for g in optimizer.param_groups]

    def on_step_end(self, args, state, control, optimizer=None, **_):
        self.outside = [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups]


def test_a_trainer_trains_resumes_and_packs(full, tiny, tmp_path):
    model = asked(full, "w4-g32", target="gguf:q4_0")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer(model, tmp_path / "run", QatlasCallback(pack=tmp_path / "packed")).train()
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert any(name.endswith("up_proj.weight") for name in changed) and any(name.endswith("weight_quantizer.scale") for name in changed)

    other = asked(full, "w4-g32", target="gguf:q4_0")             # a process that was killed after step 2
    trainer(other, tmp_path / "run2", QatlasCallback()).train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert same(other, model)
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-4")
    assert same(third, model)
    fourth = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-2")        # and one that starts from the checkpoint itself
    trainer(fourth, tmp_path / "run3", QatlasCallback()).train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert same(fourth, model)

    logits = tiny.answer(model.eval(), "llama")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert isinstance(packed.model.layers[0].mlp.up_proj, Packed) and torch.equal(tiny.answer(packed, "llama"), logits)
    assert torch.equal(tiny.answer(pack(third), "llama"), logits)
    third.save_pretrained(tmp_path / "third")                     # packed by hand: its save_pretrained writes codes from now on
    assert torch.equal(tiny.answer(AutoModelForCausalLM.from_pretrained(tmp_path / "third"), "llama"), logits)
    with pytest.raises(ValueError, match="purely quantized"):     # transformers' own word on training a packed model
        trainer(packed, tmp_path / "no")


def test_scales_never_decay_and_have_a_rate_of_their_own(full, tmp_path):
    model, watch = asked(full, "w4"), Watch()
    run = trainer(model, tmp_path / "run", QatlasCallback(scale_lr=0.02), watch, max_steps=1, lr_scheduler_type="constant")
    sizes = [q.scale.detach().abs().mean().item() for q in quantizers(model).values()]
    run.train()
    n = len(sizes)
    own = [group for group in watch.inside if group[0] == 1]
    assert n == 14 and len(watch.inside) == 2 + n and [group[1] for group in watch.inside] == [0.1] + [0.0] * (n + 1)
    assert sorted(group[2] for group in own) == pytest.approx(sorted(0.02 * size for size in sizes))
    assert len(watch.outside) == 2 and sum(group[0] for group in watch.outside) == len(list(model.parameters()))

    # without a gradient there is no step: the weights decay, the scales stay
    still = asked(full, "w4")
    start = {name: p.detach().clone() for name, p in still.named_parameters()}
    run = Trainer(still, arguments(tmp_path / "still", max_steps=1, learning_rate=0.1), train_dataset=ROWS, callbacks=[QatlasCallback(scale_lr=None)],
                  compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum() * 0)
    run.train()
    moved = {name for name, p in still.named_parameters() if not torch.equal(p, start[name])}
    assert "model.layers.0.mlp.up_proj.weight" in moved and not any(name.endswith(".scale") for name in moved)


def test_bf16_is_autocast_and_leaves_the_masters(full, tmp_path):
    model = asked(full, "w4a8")
    trainer(model, tmp_path / "run", QatlasCallback(), bf16=True, max_steps=1).train()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_static_activations_are_calibrated_before_the_trainer_is_made(full, tiny, tmp_path):
    model = asked(full, "w4a8-static")
    with pytest.raises(QuantError, match=r"14 quantizers wait for calibration, first .*input_quantizer.*calibrate_on"):
        trainer(model, tmp_path / "run", QatlasCallback())
    assert calibrate_on(model, [{"input_ids": row["input_ids"][None]} for row in ROWS]) == 14
    trainer(model, tmp_path / "run", QatlasCallback(), max_steps=2).train()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-2")
    assert same(again, model) and torch.equal(tiny.answer(again, "llama"), tiny.answer(model.eval(), "llama"))
    assert all(q.quant.grid.signed is not None for q in quantizers(again).values() if isinstance(q.quant.grid, Uniform))


def test_a_model_quantized_by_hand_is_saved_well_by_the_trainer(full, tiny, tmp_path):
    model = quantize(AutoModelForCausalLM.from_pretrained(full), "w3")
    trainer(model, tmp_path / "run", QatlasCallback(), max_steps=2).train()
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-2"), model)


def test_kept_buffers_are_refreshed(full, tmp_path):
    model = asked(full, [*keep_full("@embedding", "@head"), Rule("*", weight=weight(4), keep="buffer")])

    class Hidden(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.data = p.data * 1.5                     # no version counter sees it

    run = Trainer(model, arguments(tmp_path / "run", max_steps=1), train_dataset=ROWS, callbacks=[QatlasCallback()],
                  optimizers=(Hidden(model.parameters(), lr=0.1), None))
    run.train()
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(layer.computed(), layer.hard())


def test_what_a_trainer_cannot_train_is_refused(full, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(full)
    with pytest.raises(RunError, match="has no quantized layer.*QatlasConfig"):
        trainer(plain, tmp_path / "run", QatlasCallback())
    packed = pack(quantize(AutoModelForCausalLM.from_pretrained(full), "w4"))
    packed.hf_quantizer = None
    packed.is_quantized = False
    with pytest.raises(RunError, match="is packed"):
        trainer(packed, tmp_path / "run", QatlasCallback())
    with pytest.raises(RunError, match="bf16_full_eval"):
        trainer(asked(full, "w4"), tmp_path / "run", QatlasCallback(), bf16_full_eval=True)
    with pytest.raises(RunError, match="is bfloat16.*masters"):
        trainer(asked(full, "w4").to(torch.bfloat16), tmp_path / "run", QatlasCallback())
    with pytest.raises(RunError, match="scale_lr=-1"):
        QatlasCallback(scale_lr=-1)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("")
    with pytest.raises(CheckpointError, match="not an empty directory"):
        trainer(asked(full, "w4"), tmp_path / "run", QatlasCallback(pack=tmp_path / "taken"))


def test_wrong_configs_are_one_clear_error(full, tmp_path):
    with pytest.raises(QuantError, match="w<bits>"):
        QatlasConfig("four bits")
    with pytest.raises(FormatError, match="gguf:q4_0"):
        QatlasConfig("w4-g32", target="gguf:q4_00")
    with pytest.raises(RuleError, match="is no Rule"):
        QatlasConfig([3])
    with pytest.raises(CheckpointError, match="no layers and no rules"):
        QatlasConfig()
    with pytest.raises(FormatError, match="refused as well"):
        asked(full, "w8", target="gguf:q4_0")
    out = tmp_path / "out"
    asked(full, "w4").save_pretrained(out)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        AutoModelForCausalLM.from_pretrained(out, quantization_config=QatlasConfig("w8"))
    with pytest.raises(CheckpointError, match="in training"):
        load_into(AutoModelForCausalLM.from_pretrained(full), out)


BROKEN = {"class": ("layer", "Evil", "Evil"), "kind": ("layer", "QEmbedding", "stands for"), "shape": ("state", {"scale": [3]}, "of another shape"),
          "tied": ("tied", "nowhere", "nowhere"), "rules": ("trainable", {}, "rules and no layers"), "name": ("name", "", "lacks")}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_description_is_one_clear_error(how, full, tmp_path):
    asked(full, "w4").save_pretrained(tmp_path / "out")
    config = json.loads((file := tmp_path / "out/config.json").read_text())
    key, value, match = BROKEN[how]
    layers = config["quantization_config"]["trainable"]
    meta = layers["model.layers.0.mlp.up_proj"]
    if key == "trainable":
        config["quantization_config"]["trainable"] = value
    elif key == "name":
        layers["model.layers.7.mlp.up_proj"] = meta
    elif key == "state":
        meta["quantizers"]["weight"]["state"] = value
    else:
        meta[key] = value
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_front_page_shows_two_names():
    assert sorted(qatlas.__all__) == ["QatlasCallback", "QatlasConfig"]


def test_the_lines_of_the_readme_run(full, tmp_path, monkeypatch):
    """The code block of "In a Trainer script", with the names that it leaves open."""
    block = re.search(r"## In a Trainer script.*?```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    names = {"directory": full, "rows": ROWS, "TrainingArguments": lambda out, **said: arguments(out, **said)}
    source = "\n".join(line for line in block[1].splitlines() if not line.startswith("from transformers"))
    exec(compile(source, str(README), "exec"), {"AutoModelForCausalLM": AutoModelForCausalLM, "Trainer": Trainer, **names})
    assert isinstance(AutoModelForCausalLM.from_pretrained("out/packed").model.layers[0].mlp.up_proj, Packed)
