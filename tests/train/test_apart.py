"""Errors by depth are those of the blocks' outputs, without padding."""

import pytest
import torch
from tiny import llama, quantized, task
from transformers import BertConfig, BertForSequenceClassification

from qatlas.core.error import QuantError, RunError
from qatlas.model.blocks import blocks
from qatlas.train import data
from qatlas.train.apart import depth_errors
from qatlas.train.labelled import Classification


def test_equal_models_are_nowhere_apart():
    assert depth_errors(llama(), llama(), task(), n=2) == [0.0, 0.0]


def test_the_numbers_are_means_over_held_out_batches():
    student, teacher, subject = quantized(llama(), "w2").train(), llama(), task()
    found = depth_errors(student, teacher, subject, n=2)
    assert student.training and len(found) == 2 and min(found) > 0
    batches = list(subject.held_out())[:2]
    ours, theirs = ([torch.cat(x) for x in zip(*(hidden(model, batch) for batch in batches), strict=True)] for model in (student, teacher))
    assert found == pytest.approx([float((x - y).square().mean()) for x, y in zip(ours, theirs, strict=True)], rel=1e-5)
    assert depth_errors(student, teacher, subject, n=1) != found


@torch.no_grad()
def hidden(model, batch):
    """The outputs of both blocks, by torch's own hooks."""
    kept = []
    hooks = [block.register_forward_hook(lambda module, args, out: kept.append(out)) for _, block in blocks(model)]
    model.eval()(input_ids=batch["input_ids"])
    for hook in hooks:
        hook.remove()
    return kept


def letters(*sentences, **how):
    rows = [[1 + ord(c) % 8 for c in s] for s in sentences[0]]
    longest = max(map(len, rows))
    return {"input_ids": torch.tensor([r + [0] * (longest - len(r)) for r in rows]),
            "attention_mask": torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])}


def test_padding_does_not_count():
    """The same sentences, alone or beside a longer one: the same errors."""
    def bert(seed):
        torch.manual_seed(seed)
        return BertForSequenceClassification(BertConfig(vocab_size=12, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
                                                        max_position_embeddings=16, num_labels=2))

    rows = {"sentence": ["ab", "abcdefgh"], "label": [0, 1]}
    together, alone = (Classification(data.Table(rows, rows), letters, batch=n) for n in (2, 1))
    student, teacher = bert(0), bert(1)
    assert depth_errors(student, teacher, together) == pytest.approx(depth_errors(student, teacher, alone), rel=1e-5)


def test_models_that_cannot_be_compared_are_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    with pytest.raises(RunError, match=r"the student has 2 blocks .* and the teacher 3"):
        depth_errors(llama(), LlamaForCausalLM(LlamaConfig(**sizes, hidden_size=16, num_hidden_layers=3)), task())
    with pytest.raises(RunError, match=r"layers\.0 gives \(4, 16, 16\), and the teacher's \(4, 16, 8\)"):
        depth_errors(llama(), LlamaForCausalLM(LlamaConfig(**sizes, hidden_size=8, num_hidden_layers=2)), task())
    with pytest.raises(QuantError, match="no repeated blocks"):
        depth_errors(torch.nn.Linear(2, 2), llama(), task())
