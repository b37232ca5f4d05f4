"""A cached teacher gives the live one's loss, is asked once, and is never another teacher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks_cached import taught
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_labelled import Bag, table, tokenizer
from tiny import Stop, llama, quantized, task

from qatlas.core.error import CheckpointError, RunError
from qatlas.papers.lsq import lsq
from qatlas.train import cached as module
from qatlas.train import loss
from qatlas.train.answers import Answers
from qatlas.train.cached import CachedTeacher, cached, kept, keys, predicted
from qatlas.train.chat import Chat
from qatlas.train.fit import fit
from qatlas.train.labelled import Classification, Images
from qatlas.train.optim import AdamW
from qatlas.train.run import Run
from qatlas.train.teacher import Distil, SelfTeacher, Teacher

QUIET = Run(progress=False)
TALKS = [[{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd" * (1 + i)}] for i in range(8)]


class Counted(Teacher):
    """A teacher that notes how many rows it was asked about."""

    rows = 0

    def __call__(self, task, batch):
        self.rows += len(batch["labels"])
        return super().__call__(task, batch)


def sentences(labels=(0, 1, 2, 3), run=QUIET, **more):
    said = ["good", "a bad one", "neither", "it was so very fine"]
    return Classification(table([labels[i % 4] for i in range(24)], sentence=[said[i % 4] + "x" * (i // 4) for i in range(24)]),
                          tokenizer, run=run, batch=6, **more)


def different(subject, steps):
    """The number of different samples in so many steps: the tiny text repeats itself."""
    return len({tuple(row) for step in range(steps) for row in subject.batch(step)["input_ids"].tolist()})


def both(tmp_path, subject, student, teacher, k, steps=6, **more):
    """The losses of all batches with the live and with the cached teacher."""
    stored = CachedTeacher(tmp_path / "cache", teacher, k)
    stored.fill(subject, steps)
    read = CachedTeacher(tmp_path / "cache", k=k)
    batches = [subject.batch(step) for step in range(steps)]
    return [[float(Distil(subject, t, **more)(student, batch).detach()) for batch in batches] for t in (teacher, read)]


def sharper(model, by=30.0):
    """A teacher with opinions: at random weights all tokens are nearly equal."""
    with torch.no_grad():
        model.lm_head.weight.mul_(by)
    return model


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_classes_are_kept_exactly(tmp_path, temperature):
    live, stored = both(tmp_path, sentences(), Bag(4), Teacher(other(4)), 64, temperature=temperature)
    np.testing.assert_allclose(stored, live, rtol=2e-6)
    assert min(live) > 1e-3


def other(classes):
    model = Bag(classes)
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(classes, 16, generator=torch.Generator().manual_seed(7)))
    return model


def test_the_number_of_a_regression_is_kept_exactly(tmp_path):
    subject = sentences((0.5, -1.5, 0.25, 3.0))
    live, stored = both(tmp_path, subject, Bag(1), Teacher(other(1)), 64)
    np.testing.assert_allclose(stored, live, rtol=2e-6)
    assert min(live) > 1e-3                                       # the divergence of one outcome from one would be 0
    with pytest.raises(RunError, match="a regression has none"):
        both(tmp_path, subject, Bag(1), Teacher(other(1)), 64, temperature=2.0)


@pytest.mark.parametrize("k", [32, 64])
def test_a_vocabulary_within_k_is_kept_exactly(tmp_path, k):
    live, stored = both(tmp_path, task(), llama(), Teacher(sharper(llama(seed=1))), k, temperature=2.0, share=0.5)
    np.testing.assert_allclose(stored, live, rtol=2e-6)


def test_all_but_one_is_the_live_loss_to_half_precision(tmp_path):
    """A rest of one outcome is that outcome: all that is lost is fp16."""
    live, stored = both(tmp_path, task(), sharper(llama()), Teacher(sharper(llama(seed=1))), 31)
    np.testing.assert_allclose(stored, live, rtol=2e-3)


@pytest.mark.parametrize("k", [1, 8])
def test_the_top_is_the_live_loss_less_what_is_within_the_rest(tmp_path, k):
    subject, student, teacher = task(), sharper(llama()), Teacher(sharper(llama(seed=1)))
    live, stored = both(tmp_path, subject, student, teacher, k)
    for step, (more, less) in enumerate(zip(live, stored, strict=True)):
        batch = subject.batch(step)
        p, q = (subject.logits(m, batch)[predicted(batch)].detach().log_softmax(-1) for m in (teacher.model, student))
        rest = torch.ones_like(p, dtype=torch.bool).scatter(-1, p.topk(k, -1).indices, False)
        mass = (p.exp() * rest).sum(-1)
        ratio = ((p - q).abs() * rest).max(-1).values
        assert -2e-3 < more - less < float((mass * 2 * ratio).mean())
        assert more - less > 1e-3


def test_the_gradient_is_the_live_one_to_half_precision(tmp_path):
    subject, teacher, grads = task(), Teacher(sharper(llama(seed=1))), []
    stored = CachedTeacher(tmp_path / "c", teacher, k=31)
    stored.fill(subject, 1)
    for source in (teacher, stored):
        student = sharper(llama())
        Distil(subject, source)(student, subject.batch(0)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 2e-3


def test_neither_order_nor_batch_nor_padding_matters(tmp_path):
    teacher = Counted(sharper(llama(seed=1)))
    one = Chat(TALKS, lambda text: [ord(c) % 32 for c in text], batch=2, run=QUIET)
    stored = CachedTeacher(tmp_path / "c", teacher, k=8)
    stored.fill(one, 20)
    assert teacher.rows == one.rows == len(stored.answers)
    other = Chat(TALKS, lambda text: [ord(c) % 32 for c in text], batch=7, run=Run(seed=3, progress=False))
    stored.fill(other, 5)
    assert teacher.rows == one.rows
    student, whole = sharper(llama()), other.batch(0)
    each = [{name: value[i : i + 1] for name, value in whole.items()} for i in range(7)]
    weights = [other.weight(part) for part in each]
    cut = sum(float(Distil(other, stored)(student, part).detach()) * n for part, n in zip(each, weights, strict=True)) / sum(weights)
    assert float(Distil(other, stored)(student, whole).detach()) == pytest.approx(cut, rel=1e-4)
    assert len({int(part["attention_mask"].sum()) for part in each}) > 2


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=2, max_size=4), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_a_key_is_the_sample_and_nothing_else(rows, left, right):
    def batch(rows, left, right, pad):
        n = max(map(len, rows))
        ids = [[pad] * left + row + [pad] * (n - len(row) + right) for row in rows]
        seen = [[0] * left + [1] * len(row) + [0] * (n - len(row) + right) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(seen)}

    names = keys(batch(rows, 0, 0, 0))
    assert names == keys(batch(rows, left, right, 9))
    assert names[::-1] == keys(batch(rows[::-1], right, left, 5))
    assert len(set(names)) == len({tuple(row) for row in rows})


def test_which_positions_are_predicted_belongs_to_the_sample():
    ids = torch.tensor([[1, 2, 3], [1, 2, 3]])
    batch = {"input_ids": ids, "labels": torch.tensor([[1, 2, 3], [-100, -100, 3]])}
    one, two = keys(batch, predicted(batch))
    assert one != two
    hole = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])}
    assert len(set(keys(hole))) == 2 and keys({"input_ids": ids})[0] != keys({"input_ids": ids.int()})[0]


def test_a_second_run_asks_nothing_and_gives_the_same(tmp_path):
    states, rows = [], []
    for _ in range(2):
        teacher, subject, student = Counted(sharper(llama(seed=1))), task(), quantized(llama(seed=2), "w4")
        source = cached(tmp_path / "c", teacher, subject, 12, k=8)
        rows.append(teacher.rows)
        assert source.teacher is None
        fit(student, subject, steps=12, optimizer=AdamW(1e-2), loss=Distil(subject, source))
        assert teacher.rows == rows[-1]                           # training asks nothing
        states.append(student.state_dict())
    assert rows == [different(task(), 12), 0] and rows[0] < 48
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


@pytest.mark.parametrize("micro", [None, 1])
def test_a_killed_filling_goes_on(tmp_path, monkeypatch, micro):
    monkeypatch.setattr(module, "SHARD", 1)                       # a shard for each batch
    subject = task(batch=2, run=Run(micro=micro, progress=False))

    class Killed(Counted):
        def __call__(self, task, batch):
            if self.rows >= 6:
                raise KeyboardInterrupt
            return super().__call__(task, batch)

    first, second, whole = Killed(llama(seed=1)), Counted(llama(seed=1)), Counted(llama(seed=1))
    with pytest.raises(KeyboardInterrupt):
        CachedTeacher(tmp_path / "c", first, 8).fill(subject, 8)
    (tmp_path / "c" / ".part-00003-0.safetensors").write_bytes(b"half")
    assert len(Answers(tmp_path / "c")) == 6
    CachedTeacher(tmp_path / "c", second, 8).fill(subject, 8)
    CachedTeacher(tmp_path / "d", whole, 8).fill(subject, 8)
    assert first.rows + second.rows == whole.rows == different(subject, 8)
    assert not list((tmp_path / "c").glob(".part-*"))
    a, b = ({key.name: load_file(key) for key in (tmp_path / name).iterdir() if key.name != ".lock"} for name in "cd")
    assert a.keys() == b.keys() and all(torch.equal(a[f][n], b[f][n]) for f in a for n in a[f])


def test_of_two_that_fill_one_asks(tmp_path):
    teachers, subject = [Counted(llama(seed=1)), Counted(llama(seed=1))], task()
    stores = [CachedTeacher(tmp_path / "c", t, 8) for t in teachers]
    threads = [threading.Thread(target=store.fill, args=(subject, 6)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(t.rows for t in teachers) == [0, different(subject, 6)]
    values = [float(Distil(subject, store)(llama(), subject.batch(1)).detach()) for store in stores]
    assert values[0] == values[1] and len(stores[0].answers) == len(stores[1].answers) == different(subject, 6)


def test_of_two_ranks_one_asks_and_both_learn_as_one_process_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    shared = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parents[1] / "src"), str(here)]), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    ranks = [subprocess.Popen([sys.executable, str(here / "ranks_cached.py"), str(tmp_path / "two")], stdout=subprocess.PIPE, text=True,
                              env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    try:
        said = [[float(x) for x in process.communicate(timeout=120)[0].split()] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    rows, losses = taught(tmp_path / "one")
    assert sorted(line[0] for line in said) == [0, rows] and rows > 0
    assert said[0][1:] == said[1][1:] == pytest.approx(losses, abs=2e-5)


def test_an_augmented_image_is_a_sample_of_its_own(tmp_path):
    np.savez(tmp_path / "images.npz", x=np.random.default_rng(0).integers(0, 255, (20, 4, 4, 3), dtype=np.uint8), y=np.arange(20) % 2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))

    def images(seed=0, **more):
        return Images(str(tmp_path / "images.npz"), batch=5, run=Run(seed=seed, progress=False), **more)

    still, moving, teacher = images(), images(shift=2, mirror=True), Counted(model)
    stored = CachedTeacher(tmp_path / "c", teacher)
    stored.fill(still, 12)
    assert teacher.rows == still.rows == 19
    student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
    with pytest.raises(CheckpointError, match="samples of this batch are not in .* which holds 19"):
        Distil(moving, stored)(student, moving.batch(0))
    stored.fill(moving, 12)
    assert teacher.rows > 2 * still.rows
    live, read = (float(Distil(moving, t)(student, moving.batch(11)).detach()) for t in (teacher, stored))
    assert read == pytest.approx(live, rel=1e-5)


def test_what_was_not_asked_is_an_error(tmp_path):
    subject, teacher = task(), Teacher(llama(seed=1))
    CachedTeacher(tmp_path / "c", teacher).fill(subject, 1)
    read = CachedTeacher(tmp_path / "c")
    Distil(subject, read)(llama(), subject.batch(0))
    with pytest.raises(CheckpointError, match="4 of 4 samples .* Fill it with the live teacher"):
        Distil(subject, read)(llama(), subject.batch(1))
    with pytest.raises(RunError, match="lacks samples of step 1, and there is no live teacher"):
        read.fill(subject, 2)
    with pytest.raises(CheckpointError, match="which holds 0"):
        Distil(subject, CachedTeacher(tmp_path / "empty"))(llama(), subject.batch(0))
    assert not (tmp_path / "empty").exists()


def test_the_rest_has_no_temperature_and_the_vocabulary_must_fit(tmp_path):
    subject, teacher, student = task(), Teacher(llama(seed=1)), llama()
    stored = CachedTeacher(tmp_path / "c", teacher, 8)
    stored.fill(subject, 1)
    with pytest.raises(RunError, match="temperature=2: .* 8 of 32 outcomes"):
        Distil(subject, stored, temperature=2.0)(student, subject.batch(0))
    student.resize_token_embeddings(40)
    with pytest.raises(RunError, match="teacher has 32 classes .* student 40"):
        Distil(subject, stored)(student, subject.batch(0))


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_another_teacher_k_or_precision_is_refused(tmp_path):
    where, subject, teacher = tmp_path / "c", task(), Teacher(llama(seed=1))
    CachedTeacher(where, teacher, 8).fill(subject, 2)
    before = files(where)
    with pytest.raises(CheckpointError, match="of another teacher"):
        CachedTeacher(where, Teacher(llama(seed=2)), 8)
    with pytest.raises(CheckpointError, match="8 most probable outcomes of 32, not of k=64"):
        CachedTeacher(where, teacher)
    with pytest.raises(CheckpointError, match="precision 'no', this run has 'bf16'"):
        CachedTeacher(where, teacher, 8).fill(task(run=Run(precision="bf16", progress=False)), 2)
    with pytest.raises(CheckpointError, match="not of one kind .* classes: 4, the others 32"):
        CachedTeacher(where, Teacher(llama(seed=1)), 8).answers.add(
            module.Facts(Answers(where).facts.teacher, 4, 4, "no"), b"0" * 32, kept(torch.zeros(1, 4), 8))
    with pytest.raises(RunError, match="k=0"):
        CachedTeacher(where, teacher, 0)
    assert files(where) == before
    with pytest.raises(RunError, match="NaN"):
        broken = llama()
        broken.lm_head.weight.data.fill_(torch.nan)
        CachedTeacher(tmp_path / "d", Teacher(broken), 8).fill(subject, 1)
    assert not list((tmp_path / "d").glob("part-*"))


def shortened(path):
    path.write_bytes(path.read_bytes()[:-7])


def emptied(path):
    path.write_bytes(b"")


def foreign(path):
    save_file({"weight": torch.zeros(2)}, path)


def resized(path):
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    save_file({**load_file(path), "values": torch.zeros(3, 9, dtype=torch.half)}, path, said)


def renumbered(path):
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["qatlas"])
    save_file(load_file(path), path, {"qatlas": json.dumps({**said, "format": 99})})


@pytest.mark.parametrize("harm, said", [(shortened, "truncated, changed"), (emptied, "truncated, changed"), (foreign, "no part of"),
                                        (resized, "shapes contradict"), (renumbered, "format 99")])
def test_a_broken_shard_is_one_clear_error(tmp_path, harm, said):
    where, teacher = tmp_path / "c", Teacher(llama(seed=1))
    CachedTeacher(where, teacher, 8).fill(task(), 2)
    harm(next(where.glob("part-*")))
    before = files(where)
    with pytest.raises(CheckpointError, match=said) as caught:
        CachedTeacher(where, teacher, 8)
    assert str(where) in str(caught.value) and files(where) == before


def test_a_changed_bit_is_found_when_it_is_read(tmp_path):
    where, subject = tmp_path / "c", task()
    CachedTeacher(where, Teacher(llama(seed=1)), 8).fill(subject, 1)
    path = next(where.glob("part-*"))
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    tensors["values"][0, 0] += 1
    save_file(tensors, path, said)
    with pytest.raises(CheckpointError, match="not those that were written"):
        Distil(subject, CachedTeacher(where, k=8))(llama(), subject.batch(0))


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="'model.safetensors', no part of"):
        CachedTeacher(tmp_path, Teacher(llama()))
    with pytest.raises(CheckpointError, match="is a file"):
        CachedTeacher(tmp_path / "model.safetensors")
    with pytest.raises(RunError, match="cannot be written"):
        CachedTeacher("/proc/nothing", Teacher(llama())).fill(task(), 1)


def test_half_precision_holds_a_certain_teacher():
    said = kept(torch.tensor([[200.0, -1e5, -1e5, -1e5]]), 2)
    assert said.values.tolist() == [[0.0, -65504.0, -65504.0]] and said.index.tolist()[0][0] == 0
    assert float(loss.kl_top(torch.tensor([[200.0, 0.0, 0.0, 0.0]]), said.index.long(), said.values)) == pytest.approx(0.0, abs=1e-6)


def test_the_student_with_its_quantizers_off_can_be_cached(tmp_path):
    subject, student = task(), quantized(llama(), "w2")
    source = cached(tmp_path / "c", SelfTeacher(student), subject, 2)
    live, read = (float(Distil(subject, t)(student, subject.batch(1)).detach()) for t in (SelfTeacher(student), source))
    assert read == pytest.approx(live, rel=1e-5) and live > 0


def test_lsq_learns_from_the_cache_what_it_learns_from_the_live_teacher(tmp_path):
    losses, weights = [], []
    for where in (None, tmp_path / "c", tmp_path / "c"):
        subject = task()
        model = lsq(sharper(llama()), subject, bits=2, distil=True, teacher_cache=None if where is None else str(where), steps=12, lr=1e-3)
        losses.append(subject.run.histories[0].loss)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert float((weights[1] - weights[0]).norm() / weights[0].norm()) < 1e-4
    assert torch.equal(weights[1], weights[2]) and losses[1] == losses[2]
    assert losses[0][-1] < losses[0][0]


def test_a_cache_without_a_teacher_is_refused_and_a_plan_writes_none(tmp_path):
    with pytest.raises(RunError, match="without distil"):
        lsq(llama(), task(), teacher_cache=str(tmp_path / "c"), steps=1)
    planned = Run(progress=False)
    planned.plan = True
    assert isinstance(cached(tmp_path / "c", Teacher(llama()), task(run=planned), 4), Teacher)
    assert not list(tmp_path.iterdir())


def test_it_resumes_to_the_same_bits_and_not_with_another_teacher(tmp_path, monkeypatch):
    def one(out, stop_at=None, resume=False, cache="cache"):
        subject = task(run=Run(tmp_path / out, save_every=1, resume=resume, progress=False))
        subject.run.tactics = (Stop(stop_at),)
        return lsq(sharper(llama()), subject, bits=2, distil=True, teacher_cache=cache and str(tmp_path / cache), steps=4)

    whole = one("whole", cache="other")
    with pytest.raises(KeyboardInterrupt):
        one("halted", stop_at=2)
    with pytest.raises(CheckpointError, match="'source': {.* there, .*'source': 'live'.* here"):
        one("halted", resume=True, cache=None)
    monkeypatch.setattr(Teacher, "__call__", None)                # all is there: the teacher is not asked again
    again = one("halted", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
