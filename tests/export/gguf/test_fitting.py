import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qatlas.core.error import FormatError
from qatlas.core.grain import Block, Group, PerChannel, PerTensor
from qatlas.core.grid import Float, HalfStep, Sign, Stretched, Ternary, Uniform
from qatlas.core.qtensor import Stacked
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, AbsMean, Learned, MinMax
from qatlas.core.scheme import weight
from qatlas.export.gguf import TARGETS, fit, why_not
from qatlas.export.gguf.file import integers
from qatlas.export.gguf.layout import LAYOUTS

SHAPE = (16, 512)
GRIDS = [Uniform(2), Uniform(3), Uniform(4), Uniform(4, narrow=True), Uniform(3, False), Uniform(8), Ternary(), Ternary(0.7), Sign(), HalfStep(2),
         HalfStep(3), Stretched(4), Float(2, 1)]
IMAGES = {"q4_0": [Ternary(), Uniform(2), Uniform(3), Uniform(4), Sign(), HalfStep(3)], "q8_0": [Ternary(), *map(Uniform, range(1, 9)), Float(2, 1)],
          "tq2_0": [Ternary(), Sign()]}
GRAINS = [PerTensor(), PerChannel(), Group(32), Group(64), Group(256), Block(4, 64)]


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("grain", GRAINS, ids=str)
def test_what_is_let_through_is_exact(target, grid, grain):
    quant = Quant(grid, grain, AbsMean(2.0))
    try:
        fitted = fit(quant, target, SHAPE)
    except FormatError:
        assert why_not(Quant(grid, grain, AbsMean(2.0, dtype="float16")), target, SHAPE)
        return
    assert (fitted.grid, fitted.grain, fitted.scale.dtype) == (grid, grain, "float16") and fit(fitted, target, SHAPE) == fitted
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 2, SHAPE[0])[:, None]    # down into subnormal steps
    tensor, layout = fitted.quantize(x), LAYOUTS[target]
    assert why_not(tensor, target) is None
    q, d = layout.unpack(layout.pack(*integers(tensor, target)))
    assert torch.equal(d.repeat_interleave(layout.size, -1) * q, tensor.dequantize())


@pytest.mark.parametrize("target, grid", [(target, grid) for target, grids in IMAGES.items() for grid in grids])
def test_grids_with_an_exact_image(target, grid):
    assert fit(Quant(grid), target, SHAPE).scale.dtype == "float16"


@given(st.integers(0, 2**31), st.sampled_from(["q4_0", "q8_0", "tq2_0"]))
def test_the_formats_own_quant_fits(seed, target):
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed))
    assert why_not(TARGETS[target].quantize(x), target) is None


def test_the_kind_of_scale_and_the_refit_stay():
    quant = Quant(Ternary(0.7), PerChannel(), Learned(AbsMean(), sign="free"), refit=True)
    fitted = fit(quant, "tq2_0", SHAPE)
    assert fitted == quant.but(scale=quant.scale.but(dtype="float16"))
    assert fit(quant, "f32", SHAPE) == quant


HALF = AbsMax(dtype="float16")
REFUSED = {
    "group 64 ternary": (Quant(Ternary(), Group(64), HALF), "tq2_0", SHAPE, "multiple of 256"),
    "group 16": (Quant(Uniform(4), Group(16), HALF), "q4_0", SHAPE, "multiple of 32"),
    "group 48 straddles": (Quant(Uniform(4), Group(48), HALF), "q4_0", (4, 96), "multiple of 32"),
    "group that does not divide": (Quant(Uniform(4), Group(96), HALF), "q4_0", SHAPE, "does not divide"),
    "feature axis": (Quant(Uniform(4), PerChannel(-1), HALF), "q4_0", SHAPE, "different steps"),
    "K = 200": (Quant(Uniform(4), PerChannel(), HALF), "q4_0", (4, 200), "no multiple of 32"),
    "K = 96 ternary": (Quant(Ternary(), PerChannel(), HALF), "tq2_0", (4, 96), "no multiple of 256"),
    "convolution": (Quant(Uniform(4), PerChannel(), HALF), "q4_0", (4, 32, 3, 3), "matrices"),
    "float offset": (Quant(Uniform(4), Group(32), MinMax(zero="offset", dtype="float16")), "q4_0", SHAPE, "offset"),
    "zero point": (Quant(Uniform(4), Group(32), Learned(MinMax(), dtype="float16")), "q4_0", SHAPE, "zero point"),
    "5 bits": (Quant(Uniform(5), Group(32), HALF), "q4_0", SHAPE, "-8 .. 7"),
    "unsigned 4 bits": (Quant(Uniform(4, False), Group(32), HALF), "q4_0", SHAPE, "-8 .. 7"),
    "two bits in three values": (Quant(Uniform(2), Group(256), HALF), "tq2_0", SHAPE, "-1 .. 1"),
    "nine bits": (Quant(Uniform(9), Group(32), HALF), "q8_0", SHAPE, "9 bits"),
    "thirds": (Quant(Stretched(3), Group(32), HALF), "q8_0", SHAPE, "power of two"),
    "unsettled": (Quant(Uniform(4, None), Group(32), HALF), "q4_0", SHAPE, "signed"),
    "fp32 step": (Quant(Uniform(4), Group(32), AbsMax()), "q4_0", SHAPE, "float32"),
    "nested step": (Quant(Uniform(4), Group(32), AbsMax(dtype="float16", nested=Quant(Uniform(6, False)))), "q4_0", SHAPE, "themselves quantized"),
    "dense fp16 of int4": (Quant(Uniform(4), Group(32), HALF), "f16", SHAPE, "11 bits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    quant, target, shape, says = REFUSED[name]
    assert says in (why_not(quant, target, shape) or "")
    if name != "fp32 step":
        with pytest.raises(FormatError, match="nearest scheme"):
            fit(quant, target, shape)


def test_the_refusal_names_who_can():
    with pytest.raises(FormatError, match=r"gguf:q4_0") as error:
        fit(weight(1.58, Group(64)), "tq2_0", SHAPE)
    assert "w1.58-g256" in str(error.value)


def test_a_step_that_fp16_would_round_is_refused_and_one_it_holds_is_not():
    quant = Quant(Uniform(4), Group(32), AbsMax())
    x = torch.randn(8, 64)
    assert "no fp16 numbers" in why_not(quant.quantize(x), "q4_0")
    assert why_not(quant.but(scale=HALF).quantize(x), "q4_0") is None
    exact = quant.quantize(x)
    exact.scale = torch.full_like(exact.scale, 0.25)
    assert why_not(exact, "q4_0") is None
    exact.scale[0, 0] = 1e6                                        # fp16 ends at 65504
    assert "no fp16 numbers" in why_not(exact, "q4_0")


def test_composites_are_refused_but_for_plain_values():
    part = TARGETS["q4_0"].quantize(torch.randn(8, 64))
    both = Stacked([part, part])
    assert "several parts" in why_not(both, "q4_0", (8, 64)) and why_not(both, "f32", (8, 64)) is None


def test_unknown_target_names_the_nearest():
    for call in (why_not, fit):
        with pytest.raises(FormatError, match="nearest: gguf:q4_0"):
            call(weight(4), "q4_1", SHAPE)
