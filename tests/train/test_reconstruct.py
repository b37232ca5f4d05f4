"""reconstruct: each block learns its own output behind quantized blocks; the same bits whether streams lie on disk, or a run was killed."""

import functools
import weakref

import pytest
import torch
from tiny import Stop, llama, task
from transformers import BertConfig, BertForSequenceClassification

from qatlas.core.error import CheckpointError, RuleError
from qatlas.core.estimator import Clip
from qatlas.core.grain import Group, PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, Learned, MinMax
from qatlas.layers.packed import Packed, PackedLinear
from qatlas.layers.quantized import Quantized
from qatlas.model.pack import pack
from qatlas.model.quantized import quantized
from qatlas.model.roles import Role
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.record import Record, Watch
from qatlas.train.labelled import Classification
from qatlas.train.optim import AdamW
from qatlas.train.reconstruct import BlockTask, reconstruct
from qatlas.train.run import Run
from qatlas.train.streams import Walk
from qatlas.train.tactic import Tactic

W2 = Quant(Uniform(2, False), Group(8), Learned(MinMax(), factor=1.0, margin=0.5, floor=1e-4), Clip(0.5))
RULES = [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*", weight=W2)]
FAST = AdamW(lr=3e-3, scale_lr=1e-3)
IDS = torch.arange(24).view(2, 12) % 32


def loud(**more):
    """Weights large enough that rounding them is heard."""
    model = llama(**more)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(10) if parameter.dim() > 1 else None
    return model


def one(out=None, stop=None, resume=False, model=None, **more):
    given = task(run=Run(out, save_every=1, resume=resume, progress=False) if out else Run(progress=False))
    given.run.tactics = (Stop(stop),) if isinstance(stop, int) else () if stop is None else (stop,)
    model = loud() if model is None else model
    histories = reconstruct(model, given, **{"rules": RULES, "steps": 6, "batches": 4, "optimizer": FAST, **more})
    return model, histories


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_every_block_comes_nearer_to_what_it_gave():
    _, histories = one(steps=60)
    assert len(histories) == 2
    for history in histories:
        assert sum(history.loss[-8:]) < 0.7 * sum(history.loss[:8]) and len(history.loss) == 60


def test_one_step_at_a_time_is_the_formula():
    """The first loss is the mean squared error of the rounded block behind rounded blocks; the target is the full-precision model's own."""
    model, histories = one(steps=1, optimizer=AdamW(lr=0.0), batches=1)
    given, full = task(), loud()
    batch = given.batch(0)["input_ids"]
    states = [m(batch, output_hidden_states=True).hidden_states for m in (quantize(loud(), RULES), full)]
    error = (states[0][1] - states[1][1]).square().mean()
    torch.testing.assert_close(torch.tensor(histories[0].loss[0]), error)
    second = [m.model.layers[1](h[1], position_embeddings=m.model.rotary_emb(h[1], torch.arange(16)[None]),
                                attention_mask=torch.full((1, 1, 16, 16), -torch.inf).triu(1)) for m, h in zip((model, full), states, strict=True)]
    torch.testing.assert_close(torch.tensor(histories[1].loss[0]), (second[0] - second[1]).square().mean())


def test_quantized_before_or_on_the_way_in_memory_or_on_disk_packed_or_not(tmp_path):
    whole, _ = one()
    before, _ = one(model=quantize(loud(), RULES), rules=None)
    assert same(whole, before)
    disk, _ = one(streams=tmp_path / "streams", packed=True)
    assert not list((tmp_path / "streams").iterdir())
    assert isinstance(disk.model.layers[1].mlp.up_proj, PackedLinear) and type(disk.lm_head) is torch.nn.Linear
    assert torch.equal(disk(IDS).logits, whole(IDS).logits) and torch.equal(pack(disk)(IDS).logits, pack(whole)(IDS).logits)


def test_a_block_is_quantized_when_its_turn_comes_and_packed_when_it_is_over():
    seen = []

    class Look(Tactic):
        def start(self, loop):
            seen.append([{type(m) for m in block.modules() if isinstance(m, Packed | Quantized)} for block in model.model.layers])

    model = loud()
    one(model=model, packed=True, stop=Look())
    kinds = [[{k.__name__ for k in block} for block in blocks] for blocks in seen]
    assert kinds == [[{"QLinear"}, set()], [{"PackedLinear"}, {"QLinear"}]]


@pytest.mark.parametrize("stop", [2, 5, (1, 0), (1, 3)])
@pytest.mark.parametrize("packed", [False, True])
def test_a_killed_run_goes_on_at_its_block_and_step_to_the_same_bits(stop, packed, tmp_path):
    class Kill(Tactic):
        """At a step of the first block, or at one of the second; None: never."""

        def __init__(self, at=None):
            self._block, self._step = at if isinstance(at, tuple) else (0, at)

        def after(self, loop):
            if loop.step == self._step and loop.task.title == f"block {self._block + 1} of 2":
                raise KeyboardInterrupt

    whole, histories = one(packed=packed)
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path, stop=Kill(stop), packed=packed)
    block = stop[0] if isinstance(stop, tuple) else 0
    assert (tmp_path / "state/phase-01/done").is_dir() is (block == 1) and (tmp_path / f"state/phase-0{block + 1}").is_dir() is (stop != (1, 0))
    again, rest = one(tmp_path, stop=Kill(), resume=True, packed=packed)
    assert same(whole, again) and [h.loss for h in rest] == [h.loss for h in histories]
    replayed, _ = one(tmp_path, stop=Kill(), resume=True, packed=packed)
    assert same(whole, replayed)


def test_a_resume_point_of_other_arguments_is_refused(tmp_path):
    one(tmp_path)
    with pytest.raises(CheckpointError, match="task"):
        one(tmp_path, resume=True, batches=5)
    with pytest.raises(CheckpointError, match="task"):
        one(tmp_path, resume=True, loss=functools.partial(torch.nn.functional.l1_loss))


def test_only_what_is_named_is_trained():
    start = loud().state_dict()
    model, _ = one(train="*weight_quantizer.*")
    moved = [name for name, value in model.state_dict().items() if name in start and not torch.equal(value, start[name])]
    assert not moved
    model, _ = one()
    moved = [name for name, value in model.state_dict().items() if name in start and not torch.equal(value, start[name])]
    assert len(moved) == 2 * 9 and all("layers" in name for name in moved), "matrices and norms of the blocks, nothing else"
    assert all(p.requires_grad for p in model.parameters())


def test_streams_and_norms_keep_the_models_type_and_masters_are_fp32():
    model, histories = one(model=loud().bfloat16())
    kinds = {name.rpartition(".")[2]: p.dtype for name, p in model.model.layers[0].named_parameters()}
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.bfloat16 and kinds["scale"] == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert all(0 < loss < 1 for h in histories for loss in h.loss)
    walk = Walk(loud().bfloat16(), task(), 1)
    walk.push(0, walk.full)
    assert walk.full[0].dtype == torch.bfloat16


def test_micro_batches_add_up():
    losses = []
    for micro in (None, 1, 3):
        given = task(run=Run(progress=False, micro=micro))
        losses.append([h.loss for h in reconstruct(loud(), given, rules=RULES, steps=3, batches=2, optimizer=FAST)])
    for other in losses[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(losses[0]), rtol=1e-3, atol=1e-9)


def test_padding_is_not_heard(tmp_path):
    (tmp_path / "rows.csv").write_text("sentence,label\n" + "".join(f"{'the cat ' * (1 + i % 3)}sat,{i % 2}\n" for i in range(40)))

    class Letters:
        pad_token_id = 0

        def __call__(self, texts, *rest, **more):
            rows = [[1 + ord(c) % 31 for c in text] for text in texts]
            width = max(map(len, rows))
            return {"input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
                    "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])}

    given = Classification(str(tmp_path / "rows.csv"), Letters(), length=32, batch=4, run=Run(progress=False))
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                                     max_position_embeddings=64))
    walk = Walk(model, given, 2)
    walk.fork()
    walk.push(0, walk.full)
    made = BlockTask(given, walk, 0, walk.full, lambda a, b, mask: ((a - b).square().mean(-1) * mask).sum())
    batch = made.batch(0)
    assert made.weight(batch) == int(batch["mask"].sum()) < batch["mask"].numel()
    before = made.loss(model.bert.encoder.layer[0].eval(), batch)
    batch["target"] = torch.where(batch["mask"][..., None], batch["target"], 1e6)
    assert torch.equal(made.loss(model.bert.encoder.layer[0], batch), before)
    histories = reconstruct(model, given, rules=[*keep_full("*pooler*", Role.EMBEDDING, Role.CLASSIFIER), Rule("*", weight=W2)], steps=2, batches=2)
    assert len(histories) == 2


def test_static_inputs_are_settled_behind_quantized_blocks():
    static = Quant(Uniform(8, None), PerTensor(), Learned(AbsMax()), Clip())
    model, _ = one(rules=[*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*", weight=W2, input=static)], steps=2)
    assert all(layer.input_quantizer.ready and layer.input_quantizer.quant.grid.signed for layer in quantized(model).values())


def test_refusals_come_before_anything_is_replaced():
    model = loud()
    rule = Rule("@attention:key", signal=Quant(Uniform(8), PerTensor(), AbsMax()))
    with pytest.raises(RuleError, match="quantized signals inside attention"):
        one(model=model, rules=[*RULES, rule])
    model.model.layers[1].mlp.experts = torch.nn.Parameter(torch.randn(2, 16, 16))
    with pytest.raises(RuleError, match=r"1 matrices are reached by no rule.*layers\.1\.mlp\.experts"):
        one(model=model)
    assert not quantized(model)
    with pytest.raises(RuleError, match="train='\\*nothing' fits no parameter"):
        one(train="*nothing")


def test_progress_names_the_block_and_a_watch_stays_silent(capsys):
    given, seen = task(run=Run(progress=True)), Record("", {}, "")
    given.run.tactics = (Watch(seen, every=1),)
    reconstruct(loud(), given, rules=RULES, steps=10, batches=2)
    said = capsys.readouterr().err
    assert "block 1 of 2: 5 of 10, loss " in said and "block 2 of 2: 10 of 10" in said
    assert not seen.scores and not seen.curve


def test_dropout_is_off_and_quantizers_train():
    model = loud(dropout=0.5)
    _, noisy = one(model=model)
    _, plain = one()
    assert [h.loss for h in noisy] == [h.loss for h in plain]


def test_of_masters_and_moments_one_block_is_alive():
    """What benchmarks/block_ap.py measures, seen on tensors: nothing of a finished block but its codes."""
    alive, counts = [], []

    class Look(Tactic):
        def after(self, loop):
            if loop.step == 1:
                counts.append(sum(ref() is not None for ref in alive))
                moments = [t for state in loop.optimizer.state.values() for t in state.values()]
                alive.extend(weakref.ref(t) for t in [*loop.model.parameters(), *moments] if t.dim() > 1)

    model = loud().bfloat16()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    one(model=model, packed=True, stop=Look(), steps=2)
    assert counts == [0, 0] and len(alive) >= 2 * 7 * 3 * 3, "seven matrices, their steps and zeros, and two moments of each"
    kept = [name for name, p in model.named_parameters() if before.get(name) == p.data_ptr()]
    assert "model.embed_tokens.weight" in kept and "lm_head.weight" in kept, "what is not in work stays as it was loaded"
