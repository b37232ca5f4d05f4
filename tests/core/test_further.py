"""A Quant that starts from a stored tensor: the same values, the same codes, steps that learn by the closed form, two levels too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlas.core import further
from qatlas.core.error import QuantError
from qatlas.core.floats import Float
from qatlas.core.further import Levels, LevelsQuantizer
from qatlas.core.grain import Block, Group, PerChannel, PerTensor
from qatlas.core.grid import HalfStep, Ternary, Uniform
from qatlas.core.noun import from_json
from qatlas.core.qtensor import QTensor

GRIDS = (Uniform(4), Uniform(2, False), Ternary(), Float(2, 1), Float(4, 3), HalfStep(2))
GRAINS = (PerTensor(), PerChannel(), Group(8), Block(2, 8))


def draw(grid, grain, seed, place="", dtype="float16", lowest=-1.0):
    """A random stored tensor: steps of both signs and all sizes, zero among them."""
    g = torch.Generator().manual_seed(seed)
    codes = grid.encode(grid.values()[torch.randint(0, grid.count, (4, 32), generator=g)])
    shape = grain.scale_shape((4, 32))
    s = (torch.randn(shape, generator=g) * 10 ** (4 * torch.rand(shape, generator=g) + lowest)).to(getattr(torch, dtype)).float()
    other = torch.randint(-2, 3, shape, generator=g).float().clamp(grid.low, grid.high) if place == "zero" else \
        (s * torch.randint(-3, 4, shape, generator=g)).half().float() if place == "offset" else None
    return QTensor(codes, s, other if place == "zero" else None, other if place == "offset" else None, grid, grain, dtype)


def two(seed, shifted=True, dead=True):
    """A block of GGUF's kind: steps of 8 in two levels, some of them zero."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (4, 64), generator=g).to(torch.uint8)
    d, m = ((torch.randn(4, 1, generator=g) / 100).half().float() for _ in range(2))
    sc, mn = (torch.randint(0 if dead else 1, 64, (4, 8), generator=g).to(torch.uint8) for _ in range(2))
    if dead:
        d[0], m[1], sc[2, :3] = 0.0, 0.0, 0
    level = lambda c, top: QTensor(c, top, None, None, Uniform(6, False), Group(8), "float16")  # noqa: E731
    return QTensor(codes, level(sc, d), None, level(mn, -m) if shifted else None, Uniform(4, False), Group(8))


@pytest.mark.parametrize("place", ["", "zero", "offset"])
@pytest.mark.parametrize("grain", GRAINS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_quantizer_starts_where_the_tensor_is(grid, grain, place):
    if place == "zero" and not isinstance(grid, Uniform):
        return
    q = draw(grid, grain, 0, place, "bfloat16" if grain == PerChannel() else "float16")
    quantizer = further.of(q).build().start(q)
    w = q.dequantize()
    assert torch.equal(quantizer(w), w) and torch.equal(quantizer.quantize(w).dequantize(), w)
    assert torch.equal(quantizer.quantize(w).values(), q.values()) and quantizer.scale.requires_grad


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.booleans())
def test_two_levels_start_where_the_tensor_is(seed, shifted, dead):
    q = two(seed, shifted, dead)
    quantizer = further.of(q).build().start(q)
    w = q.dequantize()
    again = quantizer.quantize(w)
    assert torch.equal(quantizer(w), w) and torch.equal(again.dequantize(), w) and torch.equal(quantizer.hard(w), w)
    if not dead:
        assert torch.equal(again.codes, q.codes) and torch.equal(again.scale.codes, q.scale.codes) and torch.equal(again.scale.scale, q.scale.scale)
    x = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed)) / 50
    assert torch.equal(quantizer(x), quantizer.quantize(x).dequantize())                # law 1 away from the start
    assert torch.equal(quantizer(x), quantizer(x, known=quantizer.known(x)))


def test_the_coarser_step_hears_its_closed_form():
    q = two(3, dead=False)
    quantizer = further.of(q).build().start(q)
    g = torch.Generator().manual_seed(0)
    x, up = torch.randn(4, 64, generator=g) / 50, torch.randn(4, 64, generator=g)
    x.requires_grad_()
    quantizer(x).backward(up)
    s, m = q.scale.dequantize()[..., None], q.offset.dequantize()[..., None]                            # (4, 8, 1)
    u = (x.detach().view(4, 8, 8) - m) / s
    v, inside = u.round().clamp(0, 15), (u >= 0) & (u <= 15)
    up = up.view(4, 8, 8)
    strength = 1 / (8 * 15) ** 0.5
    ds, dm = (up * (v - u * inside)).sum(-1) * strength, (up * ~inside).sum(-1) * strength
    assert torch.allclose(quantizer.scale.grad, (ds * q.scale.values()).sum(-1, keepdim=True), rtol=1e-4, atol=1e-3)
    assert torch.allclose(quantizer.offset.grad, (dm * q.offset.values()).sum(-1, keepdim=True), rtol=1e-4, atol=1e-3)
    assert torch.equal(x.grad.view(4, 8, 8), up * inside)


def test_a_step_is_rounded_to_its_type_in_the_forward():
    q = two(3)
    quantizer = further.of(q).build().start(q)
    with torch.no_grad():
        quantizer.scale.mul_(1.0003)
    found = quantizer.quantize(q.dequantize())
    assert torch.equal(found.scale.scale.half().float(), found.scale.scale) and not torch.equal(found.scale.scale, quantizer.scale)
    assert torch.equal(found.dequantize(), quantizer(q.dequantize()))


def test_it_goes_to_json_and_a_state_dict_and_back():
    q = two(5)
    quant = further.of(q)
    assert from_json(quant.to_json()) == quant and isinstance(quant, Levels)
    quantizer = quant.build().start(q)
    again = quant.build()
    assert isinstance(again, LevelsQuantizer) and not again.ready
    with pytest.raises(QuantError, match="before it has any"):
        again.place(q.dequantize())
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again(q.dequantize()), q.dequantize()) and again.scale_codes.dtype == torch.uint8
    assert torch.equal(quant.build().initialise(q.dequantize())(q.dequantize()), quant.quantize(q.dequantize()).dequantize())


def test_three_levels_do_not_train():
    q = two(5)
    q.scale.scale = QTensor(torch.ones(4, 1, dtype=torch.uint8), torch.ones(4, 1), None, None, Uniform(4, False), Group(1))
    with pytest.raises(QuantError, match="three levels"):
        further.of(q)
