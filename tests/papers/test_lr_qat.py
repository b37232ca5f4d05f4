"""LR-QAT: what it starts from, what trains, its limit cases, keys and values, resuming, files."""

import gc
import weakref

import pytest
import torch
from torch import nn
from words import IDS, llama, same, state, task

from qatlas.core.error import FormatError, QuantError
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quantizer
from qatlas.export import target
from qatlas.model.inner import installed
from qatlas.model.pack import checkpoint, load_packed, pack, save
from qatlas.model.quantized import quantized
from qatlas.papers.lr_qat import lr_qat, of_weight
from qatlas.train.run import Run
from qatlas.train.tactic import Tactic

CACHED = {"bits": 4, "input_bits": 8, "cache_bits": 4, "rank": 4}
ASYMMETRIC = {"bits": 2, "group": 32, "symmetric": False, "rank": 4}


@pytest.mark.parametrize("arguments", [{}, {"group": 16, "bits": 3}, ASYMMETRIC], ids=str)
def test_the_first_step_is_round_to_nearest(arguments):
    model, plain = lr_qat(llama(), task(), steps=1, lr=0.0, scale_lr=0.0, store="float32", **arguments), llama()
    quant = of_weight(arguments.get("bits", 4), arguments.get("group"), arguments.get("symmetric", True), 4.0)
    for name, layer in quantized(model).items():
        w = plain.get_submodule(name).weight.detach()
        assert torch.equal(layer.hard(), quant.build().initialise(w)(w).detach())


def test_only_the_product_and_the_steps_train_and_the_masters_are_gone():
    model = llama()
    masters = [weakref.ref(m.weight.untyped_storage()) for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    kept = {name: p.clone() for name, p in model.named_parameters() if "proj" not in name}
    start = state(lr_qat(model, task(), steps=1, lr=0.0, scale_lr=0.0))
    assert len(masters) == 14
    gc.collect()
    assert all(ref() is None for ref in masters)
    model = lr_qat(llama(), task(), steps=3, lr=1e-2)
    now = state(model)
    moved = {name.split(".")[-1] for name in now if not torch.equal(now[name], start[name])}
    assert moved == {"a", "b", "scale"} and all(torch.equal(now[name], kept[name]) for name in kept)
    stored = [layer.weight for layer in quantized(model).values()]
    assert sum(t.numel() * t.element_size() for t in stored) == sum(t.numel() for t in stored) and {t.dtype for t in stored} == {torch.int8}


def test_without_a_rate_for_the_product_the_steps_alone_train():
    with_product = lr_qat(llama(), task(), steps=3, lr=0.0, scale_lr=1e-2, rank=4)
    without = lr_qat(llama(), task(), steps=3, lr=0.0, scale_lr=1e-2, rank=4, alpha=0.0)
    for (name, a), b in zip(quantized(with_product).items(), quantized(without).values(), strict=True):
        assert torch.equal(a.hard(), b.hard()), name
        assert not a.adapter.b.any() and not torch.equal(a.weight_quantizer.scale, lr_start(name).scale)


def lr_start(name):
    w = llama().get_submodule(name).weight.detach()
    return of_weight(4, None, True, 4.0).build().initialise(w)


def test_keys_values_and_inputs_have_numbers_of_their_own_and_a_later_token_moves_nothing():
    model = lr_qat(llama(), task(), steps=2, **CACHED)
    inside = installed(model)
    assert {address.rpartition(":")[2] for address in inside} == {"key", "value"} and len(inside) == 4
    assert all(q.quant.grid == Uniform(4, False) for q in inside.values())
    assert all(layer.input_quantizer.quant.grid == Uniform(8, False) for layer in quantized(model).values())
    whole = model(IDS).logits
    later = IDS.clone()
    later[:, 8:] = 5
    assert torch.equal(model(later).logits[:, :8], whole[:, :8])
    prefill = model(IDS[:, :8], use_cache=True)
    rest = model(IDS[:, 8:], past_key_values=prefill.past_key_values).logits
    assert (torch.cat([prefill.logits, rest], 1) - whole).abs().max() < 1e-4 * whole.abs().max() + 1e-4


@pytest.mark.parametrize("arguments", [CACHED, ASYMMETRIC], ids=str)
def test_it_resumes_after_a_kill_to_the_same_bits(arguments, tmp_path):
    class Stop(Tactic):
        def __init__(self, at=None):
            self._at = at

        def after(self, loop):
            if loop.step == self._at:
                raise KeyboardInterrupt

    def one(out, at=None, resume=False):
        run = Run(out, save_every=1, resume=resume, progress=False)
        run.tactics = (Stop(at),)
        return lr_qat(llama(), task(run=run), steps=4, lr=1e-2, **arguments)

    whole = one(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path / "halted", at=2)
    assert same(state(whole), state(one(tmp_path / "halted", resume=True)))


@pytest.mark.parametrize("arguments", [CACHED, ASYMMETRIC], ids=str)
def test_merged_packed_and_loaded_answer_as_trained(arguments, tmp_path):
    model = lr_qat(llama(), task(), steps=3, lr=3e-2, **arguments)
    logits, codes = model(IDS).logits, {name: layer.quantize().codes for name, layer in quantized(model).items()}
    save(model, tmp_path / "saved")
    loaded = load_packed(tmp_path / "saved")
    assert torch.equal(loaded(IDS).logits, logits) and not any("adapter" in name for name in loaded.state_dict())
    for layer in quantized(model).values():
        layer.merge()
    assert all(torch.equal(layer.quantize().codes, codes[name]) and layer.adapter is None for name, layer in quantized(model).items())
    assert torch.equal(model(IDS).logits, logits) and torch.equal(pack(model)(IDS).logits, logits)


@pytest.mark.parametrize(("name", "arguments"), [
    ("gguf:q4_0", {}), ("gguf:q8_0", {"bits": 5}), ("gguf:q4_0", {"bits": 2, "group": 64}), ("gptq:w4", {"group": 64}),
    ("gptq:w2_v2", {**ASYMMETRIC, "group": 64}), ("compressed-tensors:w4a16", {}), ("awq:w4", {"symmetric": False, "group": 64})], ids=str)
def test_formats_that_hold_its_numbers_read_them_back(name, arguments, tmp_path):
    model = lr_qat(llama(), task(target=name), steps=2, **arguments)
    module, kind = target(name)
    if hasattr(module, "lacks") and module.lacks():
        pytest.skip(module.lacks())
    found = module.read(module.write(checkpoint(model), tmp_path / (f"m.{module.SUFFIX}" if module.SUFFIX else "m"), kind))
    for at, layer in quantized(model).items():
        assert torch.equal(found[f"{at}.weight"], layer.hard()), at


def test_steps_start_where_the_fourth_power_is_least():
    w = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    found, largest = (of_weight(3, None, True, power).build().initialise(w) for power in (4.0, None))
    def error(q):
        return (q(w) - w).pow(4).mean(1)
    assert (error(found) < error(largest)).all() and (found.scale < largest.scale).all()


@pytest.mark.parametrize(("wrong", "words"), [({"bits": 1}, "bits=1"), ({"bits": 8}, "2 to 7"), ({"input_bits": 16}, "input_bits=16"),
                                              ({"cache_bits": 1}, "cache_bits=1"), ({"store": "int4"}, "'int4'"), ({"bits": 9}, "bits=9")])
def test_what_is_refused_is_refused_before_anything_moves(wrong, words):
    model = llama()
    with pytest.raises(QuantError, match=words):
        lr_qat(model, task(), steps=1, **wrong)
    assert not quantized(model)


def test_a_target_without_a_zero_refuses_an_asymmetric_grid():
    with pytest.raises(FormatError, match="zero"):
        lr_qat(llama(), task(target="gguf:q4_0"), steps=1, **{**ASYMMETRIC, "bits": 4})


def test_eight_bits_in_integers():
    model = lr_qat(llama(), task(), steps=1, bits=8, store="integer")
    assert all(q.quant.bits == 8 for q in model.modules() if isinstance(q, Quantizer))
