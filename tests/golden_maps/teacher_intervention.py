"""Teacher Intervention: signals, losses and gradients of whole BERTs, by the same addresses that a user writes."""

from __future__ import annotations

import torch
from golden_cases import A, Answer, Case
from transformers import BertConfig, BertForSequenceClassification

from qatlas.model import taps
from qatlas.papers.teacher_intervention import Intervened
from qatlas.papers.ternarybert import ternarize
from qatlas.train.imitate import Imitation, find
from qatlas.train.labelled import Classification
from qatlas.train.run import Run
from qatlas.train.teacher import Teacher


class Rows(Classification):
    """The golden batch as a task."""

    def __init__(self, batch: A) -> None:
        self.only, self.run, self.target, self.extra_rules = batch, Run(progress=False), None, ()

    def batch(self, step: int) -> A:
        return self.only


def bert(c: Case, weights: A) -> BertForSequenceClassification:
    p = c.rest_p["inputs"]
    config = BertConfig(vocab_size=p["vocab"], hidden_size=p["hidden"], num_hidden_layers=p["layers"], num_attention_heads=p["heads"],
                        intermediate_size=p["ffn"], num_labels=p["labels"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                        max_position_embeddings=weights["w:bert.embeddings.position_embeddings.weight"].shape[0],
                        type_vocab_size=weights["w:bert.embeddings.token_type_embeddings.weight"].shape[0])
    model = BertForSequenceClassification(config).eval()
    model.load_state_dict({name.removeprefix("w:"): t for name, t in weights.items() if name.startswith("w:")}, strict=False)
    return model


def teacher_intervention(c: Case) -> Answer:
    inputs = c.rest["inputs"]
    batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["mask"], "token_type_ids": inputs["types"]}
    task, guide = Rows(batch), Teacher(bert(c, c.rest["teacher"]))
    names = {"hidden": "hidden", "scores": "scores", "probs": "probabilities", "context": "context", "attn_out": "attended", "ao": "projected"}
    where = {ours: find(guide.model, theirs) for ours, theirs in names.items()}
    if c.kind == "teacher":
        logits, found = guide.signals(task, batch, [address for addresses in where.values() for address in addresses])
        return {"logits": logits} | {name: torch.stack([found[a] for a in addresses]) for name, addresses in where.items()}
    model = ternarize(bert(c, c.rest["student"]), task, loss_aware=False, rows=False, embeddings=None, input_bits=8, minmax=False, per_token=None,
                      clip=2.5)
    points = {"M": "map", "C": "context", "O": "output"}
    loss = Imitation(task, guide, model, hidden=1.0, scores=1.0, attended=1.0) if c.p["mode"] == "none" else \
        Intervened(task, guide, model, points[c.p["mode"]], hidden=1.0, scores=1.0, attended=1.0)
    model.train()
    said, theirs = guide.signals(task, batch, loss.read())
    with taps.read(model, [address for addresses in where.values() for address in addresses]) as own:
        logits, read = loss.forward(model, batch, theirs)
    terms = loss.terms(batch, logits, read, said, theirs)
    losses = [terms[name] for name in ("logits", "hidden", "scores", "attended")]
    losses.append(torch.stack(losses).sum())
    parameters = dict(model.named_parameters())
    grads = [dict(zip(parameters, torch.autograd.grad(one, list(parameters.values()), retain_graph=True, allow_unused=True), strict=True))
             for one in losses]
    none = torch.tensor(-1.0)
    norms = [torch.stack([none if grad[name] is None else grad[name].norm() for name in c.p["param_names"]]) for grad in grads]
    answer = {"logits": logits, "losses": torch.stack(losses), "grad_norms": torch.stack(norms)}
    answer |= {name: torch.stack([own[a] for a in addresses]) for name, addresses in where.items()}
    return answer | {f"grad:{name}": grads[-1][name] for name in c.p["full_grads"] if grads[-1][name] is not None}
