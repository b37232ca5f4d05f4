"""The rotation with its quantizer in one kernel agrees with core/hadamard.py and core/estimator.py, but where a place lies on a tie."""

from __future__ import annotations

import pytest
import torch

from qatlas.core.error import QuantError
from qatlas.core.estimator import Clip, Trust, forward
from qatlas.core.grain import Group, PerChannel, PerToken
from qatlas.core.grid import HalfStep, Sign, Ternary, Uniform
from qatlas.core.hadamard import hadamard
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, Rms
from qatlas.kernels.triton import rotate

TWO = Quant(HalfStep(2), PerToken(), Rms(0.9956), Trust(0.5))
QUANTS = [TWO, Quant(HalfStep(4), PerToken(), Rms(0.335), Trust(0.5)), Quant(Ternary(), PerToken(), Rms(1.224), Trust(0.5)),
          Quant(Sign(), PerToken(), Rms(0.798), Clip(at=1.3)), Quant(Uniform(8), PerToken(), Rms(0.03), Clip())]


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotated(x, block):
    return hadamard(x.float().unflatten(-1, (-1, block))).flatten(-2)


@pytest.mark.parametrize("quant", QUANTS, ids=lambda q: str(q.grid))
@pytest.mark.parametrize(("width", "block"), [(128, 128), (192, 64), (48, 16)])
def test_the_eager_lines(quant, width, block, device):
    for dtype in (torch.float32, torch.bfloat16):
        x = rows(5, width).to(dtype)
        x[3] = 0.0
        y, trusted = rotate.quantize(x.to(device), quant, block)
        z = rotated(x, block)
        wanted, v, place = forward(z, quant.measure(z), None, quant)
        u = z / place.s
        sure = ((u + 0.5) % 0.5 - 0.25).abs() < 0.2499           # no tie of the grid, no end of a gate
        sure &= ((u.abs() - getattr(quant.estimator, "at", 9.0) if getattr(quant.estimator, "at", None) else u + 9).abs() > 1e-4)
        assert y.dtype == dtype and sure.float().mean() > 0.7
        torch.testing.assert_close(y.cpu().float()[sure], wanted.to(dtype).float()[sure], rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-37)
        assert torch.equal(trusted.cpu()[sure], (quant.estimator(torch.ones_like(u), u, v, quant.grid) != 0)[sure])


def test_integers_are_the_values(device):
    for quant in QUANTS:
        x = rows(3, 64).to(device)
        whole, steps = rotate.integers(x, quant, 32)
        assert whole.dtype == torch.int8 and steps.shape == (3,)
        torch.testing.assert_close(whole.float() * steps[:, None], rotate.quantize(x, quant, 32)[0], rtol=1e-6, atol=0)


def test_the_rotation_alone_and_its_gradient(device):
    x, g = rows(2, 3, 96).to(device).requires_grad_(), rows(2, 3, 96, seed=1).to(device)
    torch.testing.assert_close(rotate.turn(x, 32).cpu(), rotated(x.detach().cpu(), 32), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotate.turn(rotate.turn(x, 32), 32), x.detach(), rtol=1e-5, atol=1e-5)
    y = rotate.Rotated.apply(x, TWO, 32)
    y.backward(g)
    trusted = rotate.quantize(x, TWO, 32)[1]
    assert not trusted.all() and torch.equal(y, rotate.quantize(x, TWO, 32)[0])
    torch.testing.assert_close(x.grad.cpu(), rotated((g * trusted).cpu(), 32), rtol=1e-5, atol=1e-5)


def test_nothing_strides_and_nan(device):
    assert rotate.quantize(torch.zeros(0, 32, device=device), TWO, 32)[0].shape == (0, 32)
    x = rows(32, 3).to(device).T
    assert torch.equal(rotate.quantize(x, TWO, 32)[0], rotate.quantize(x.contiguous(), TWO, 32)[0])
    x = rows(2, 32)
    x[0, 5] = torch.nan
    y = rotate.quantize(x.to(device), TWO, 32)[0]
    assert y[0].isnan().all() and torch.equal(y[1], rotate.quantize(x[1:].to(device), TWO, 32)[0][0])


@pytest.mark.needs_no_triton
def test_why_not():
    for quant, width, block, said in ((TWO, 96, 64, "does not divide"), (TWO, 96, 8, "16 to 256"), (TWO, 65536, 128, "the kernel holds"),
                                      (TWO.but(scale=AbsMax()), 128, 128, "Rms"), (TWO.but(grain=Group(32)), 128, 128, "takes rows"),
                                      (TWO.but(grid=Uniform(4, None)), 128, 128, "snap to")):
        assert said in rotate.why_not(quant, width, block)
    assert not rotate.why_not(TWO.but(grain=PerChannel()), 128, 128)


def test_what_does_not_fit_is_said(device):
    with pytest.raises(QuantError, match="no kernel rotates and quantizes"):
        rotate.quantize(torch.zeros(1, 96, device=device), TWO, 64)
    with pytest.raises(QuantError, match="no kernel rotates this"):
        rotate.turn(torch.zeros(1, 96, device=device), 64)
    with pytest.raises(QuantError, match="does not fit into int8"):
        rotate.integers(torch.zeros(1, 64, device=device), TWO.but(grid=HalfStep(8)), 64)
