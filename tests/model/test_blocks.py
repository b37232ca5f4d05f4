"""Blocks: found in five families, recorded without running the rest, run alone bit for bit."""

import pytest
import torch
from torch import nn

from qatlas.core.error import QuantError
from qatlas.model.blocks import blocks, record, run_block

FAMILIES = ["llama", "gpt2", "bert", "vit", "resnet"]
COUNT = {"llama": 2, "gpt2": 2, "bert": 2, "vit": 2, "resnet": 3}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return True


@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_alone_gives_what_it_gave_in_the_model(name, tiny):
    model = tiny.models[name]().eval()
    found = blocks(model)
    assert len(found) == COUNT[name] and len({type(block) for _, block in found}) == 1
    for at, block in found:
        [call, other] = record(model, at, [tiny.batch(name)] * 2)
        with torch.no_grad():
            assert same(run_block(block, call), call.output) and same(run_block(block, call), call.output)
        assert same(call.output, other.output) and isinstance(call.answer, torch.Tensor)
        assert not any(block._forward_pre_hooks) and not any(block._forward_hooks)


def test_the_rest_is_not_run_and_the_block_only_when_asked(tiny):
    model = tiny.models["llama"]().eval()
    ran = []
    for name, block in blocks(model):
        block.mlp.register_forward_hook(lambda *_, name=name: ran.append(name))
    record(model, "model.layers.0", [tiny.batch("llama")])
    assert ran == ["model.layers.0"]
    [call] = record(model, "model.layers.1", [tiny.batch("llama")], output=False)
    assert ran == ["model.layers.0", "model.layers.0"] and call.output is None


def test_a_chain_of_blocks_is_the_model(tiny):
    model = tiny.models["llama"]().eval()
    first, second = (record(model, name, [tiny.batch("llama")])[0] for name, _ in blocks(model))
    with torch.no_grad():
        hidden = run_block(model.model.layers[0], first)
        assert same(run_block(model.model.layers[1], second.on(hidden)), second.output)
    out = run_block(model.model.layers[1], second)
    out.sum().backward()                                          # gradients reach the block's weights
    assert model.model.layers[1].mlp.up_proj.weight.grad is not None


def test_in_place_work_does_not_spoil_the_record():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)))
    x = torch.tensor([[-1.0, 2.0, -3.0, 4.0]])
    [call] = record(model, "1", [x])
    with torch.no_grad():
        assert same(run_block(model[1], call), call.output)
        assert torch.equal(call.hidden, model[0](x))


def test_errors_name_candidates(tiny):
    with pytest.raises(QuantError, match=r"no repeated blocks.*Found: the model itself \(2 of Linear, ReLU\)"):
        blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(QuantError, match="no ModuleList"):
        blocks(nn.Linear(2, 2))
    model = tiny.models["llama"]()
    with pytest.raises(QuantError, match=r"nearest: model.layers.1"):
        record(model, "model.layer.1", [])
    model.model.layers[1].spare = nn.Linear(2, 2)
    with pytest.raises(QuantError, match="never called"):
        record(model, "model.layers.1.spare", [tiny.batch("llama")])


def test_stages_have_lists_of_their_own(tiny):
    model = tiny.models["resnet"]()
    assert [name for name, _ in blocks(model)] == [f"resnet.encoder.stages.0.layers.{i}" for i in range(3)]
    assert len(blocks(model, within="resnet.encoder")) == 3
