"""Memory that is handed out again: never while anybody sees it."""

from __future__ import annotations

import pytest
import torch

from qatlas.core import again
from qatlas.core.scheme import scheme

X = torch.zeros(64, 512)                                          # 128 KiB: enough for a moment


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(again, "LARGE", 2**16)
    again.forget()
    yield
    again.forget()


@pytest.mark.parametrize("hold", [lambda t: t, lambda t: t.view(-1), lambda t: t[3:5], lambda t: t.numpy(), lambda t: t.untyped_storage(),
                                  lambda t: t.detach(), lambda t: torch.utils.dlpack.to_dlpack(t)],
                         ids=["tensor", "view", "slice", "numpy", "storage", "detached", "dlpack"])
@pytest.mark.parametrize("moment", [False, True])
def test_what_somebody_sees_is_not_handed_out(hold, moment):
    first = again.empty(X, moment)
    place, held = first.data_ptr(), hold(first)
    del first
    assert again.empty(X, moment).data_ptr() != place
    del held


def test_what_nobody_sees_is_and_kinds_are_apart():
    first = again.empty(X)
    assert first.shape == X.shape and first.dtype == X.dtype and first.is_contiguous()
    place = first.data_ptr()
    assert again.empty(X, moment=True).data_ptr() != place
    del first
    assert again.empty(X).data_ptr() == place
    assert again.empty(X.view(512, 64)).data_ptr() == place
    assert again.empty(X.T).is_contiguous()


def test_few_sizes_are_remembered():
    for n in range(2 * again.KEPT):
        again.empty(torch.empty(2**16 + n))
    assert len(again._known) == again.KEPT
    assert not again._known.clear() and again.empty(torch.empty(4)).shape == (4,) and not again._known


def test_gradients_of_two_steps_lie_in_one_memory_and_a_kept_one_is_left_alone():
    """The large weight's way: `.grad` is taken by autograd, dropped by the optimizer, and its memory comes again."""
    w = torch.nn.Parameter(torch.randn(1024, 1280, generator=torch.Generator().manual_seed(0)))
    quantizer = scheme("w4-g128").weight.build().initialise(w.detach())
    places, kept = [], None
    for step in range(4):
        (quantizer(w) * float(step + 1)).sum().backward()
        places.append(w.grad.data_ptr())
        if step == 1:
            kept, copy = w.grad, w.grad.clone()
        w.grad = None
    assert places[0] == places[1] and places[2] != places[1] and places[3] == places[2]
    assert torch.equal(kept, copy)


def test_under_fake_tensors_memory_stays_fake():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        assert isinstance(again.empty(torch.empty(64, 512)), FakeTensor)
    assert not again._known
