"""What is told of a step's memory: held against real steps, and counted by hand where that can be done."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qatlas.core.error import RuleError, RunError
from qatlas.layers.adapter import Lora
from qatlas.layers.frozen import Cast, Places
from qatlas.model.quantized import quantized
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.papers.l4q import TRAINED, of_weight
from qatlas.papers.lr_qat import of_weight as places_weight
from qatlas.train.memory import Held, expected
from qatlas.train.optim import trained

ROWS = {"L4Q": {"weight": of_weight(4, 32, "covering", True, False, None), "adapter": Lora(4, 8.0), "frozen": Cast(), "keep": "recompute"},
        "by autograd": {"weight": of_weight(4, 32, "covering", True, False, None), "adapter": Lora(4, 8.0), "frozen": Cast(), "keep": "each"},
        "LR-QAT": {"weight": places_weight(4, None, True, None), "adapter": Lora(4, 1.0, "shift"), "frozen": Places(), "keep": "recompute"}}
SHAPE = (2, 32)


def llama(device, row):
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                                             num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False, use_cache=False))
    return quantize(model, [*keep_full("@embedding", "@head"), Rule("*", **ROWS[row])])


def told(row):
    return expected(llama("meta", row), {"input_ids": SHAPE, "labels": SHAPE}, TRAINED)


def peak(row):
    """Of the second step, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        model = llama("cpu", row).train()
        chosen = trained(model, TRAINED)
        for p in model.parameters():
            p.requires_grad_(p in chosen)
        optimizer = torch.optim.AdamW(list(chosen))
        for number in range(2):
            with torch.profiler.record_function(f"step {number}"):
                ids = torch.arange(64).view(SHAPE)
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    events = seen.profiler.kineto_results.events()
    begin = next(e.start_ns() for e in events if e.name() == "step 1")
    held = most = 0
    for at, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        most = max(most, held) if at >= begin else most
    return most


@pytest.mark.parametrize("row", list(ROWS))
def test_what_is_told_is_near_what_is_measured(row):
    assert told(row).peak == pytest.approx(peak(row), rel=0.1)


def test_the_order_is_that_of_the_papers():
    found = {row: told(row) for row in ROWS}
    assert found["LR-QAT"].weights < found["L4Q"].weights and found["L4Q"].passing < 0.8 * found["by autograd"].passing


def test_weights_and_moments_are_counted():
    model = llama("meta", "LR-QAT")
    chosen = sum(p.numel() for p in trained(model, TRAINED))
    stored = sum(layer.weight.numel() for layer in quantized(model).values())
    rest = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) - stored
    found = expected(model, {"input_ids": SHAPE, "labels": SHAPE}, TRAINED)
    assert (found.trained, found.moments, found.weights) == (4 * chosen, 8 * chosen, stored + rest)
    assert found.peak == found.weights + found.moments + found.passing


def test_a_storage_counts_once_and_until_it_dies():
    with Held() as held:
        x = torch.zeros(10)
        y = x.view(2, 5) + 1
        assert held.now == 80
        del x
        assert held.now == 40 and held.peak == 80 and y.numel() == 10


def test_a_model_with_numbers_is_refused_and_so_is_a_glob_for_nothing():
    with pytest.raises(RunError, match="has numbers, and 1 more"):
        expected(nn.Linear(2, 2), {"x": (1, 2)})
    with pytest.raises(RuleError, match="fits no parameter"):
        expected(llama("meta", "L4Q"), {"input_ids": SHAPE}, train="*.nothing")
