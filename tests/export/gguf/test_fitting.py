import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlas.core.codebook import IQ4_NL, NF4, Codebook
from qatlas.core.error import FormatError
from qatlas.core.floats import Float
from qatlas.core.grain import Block, Group, PerChannel, PerTensor
from qatlas.core.grid import HalfStep, Sign, Stretched, Ternary, Uniform
from qatlas.core.qtensor import Stacked
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, AbsMean, Learned, MinMax
from qatlas.core.scheme import weight
from qatlas.export.gguf import TARGETS, fit, why_not
from qatlas.export.gguf.file import packed
from qatlas.export.gguf.layout import LAYOUTS

SHAPE = (16, 512)
GRIDS = [Uniform(2), Uniform(4), Uniform(4, narrow=True), Uniform(3, False), Uniform(8), Ternary(0.7), HalfStep(2), Stretched(4), Float(2, 1),
         IQ4_NL, NF4]
IMAGES = {
    "q4_0": [Ternary(), Uniform(2), Uniform(3), Uniform(4), Sign(), HalfStep(3)], "q8_0": [Ternary(), *map(Uniform, range(1, 9)), Float(2, 1)],
    "tq2_0": [Ternary(), Sign()], "tq1_0": [Ternary(0.7), Sign()], "q5_0": [Uniform(5), HalfStep(4)], "q4_1": [Uniform(4), Ternary(), HalfStep(2)],
    "q5_1": [Uniform(5), HalfStep(4)], "q2_k": [HalfStep(2), Uniform(2), Ternary(), Sign(), Stretched(4)], "q3_k": [Uniform(3), HalfStep(2)],
    "q4_k": [Uniform(4), HalfStep(4), Ternary()], "q5_k": [Uniform(5), HalfStep(5)], "q6_k": [Uniform(6), HalfStep(5), Float(2, 1)],
    "iq4_nl": [IQ4_NL, Codebook((-127, 1, 113)), Codebook((-5, 0.5))],
    "mxfp4": [Float(2, 1), Ternary(), HalfStep(2), Uniform(2), Stretched(4)]}
GRAINS = [PerTensor(), Group(16), Group(256), Block(4, 64)]
FINE = [Group(16), Block(4, 64)]


def same(rows, layout, tensor):
    """Whether the gguf package reads these bytes as the tensor."""
    return np.array_equal(gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[layout.type]), tensor.dequantize().numpy())


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
    assert (fitted.grid, fitted.grain) == (grid, grain) and fit(fitted, target, SHAPE) == fitted
    two = fitted.scale.nested is not None
    assert fitted.scale.dtype == ("float32" if two else LAYOUTS[target].dtype) and two == (LAYOUTS[target].subs > 1 and grain in FINE)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 2, SHAPE[0])[:, None]    # down into subnormal steps
    tensor, layout = fitted.quantize(x), LAYOUTS[target]
    assert why_not(tensor, target) is None
    assert same(packed(tensor, target), layout, tensor)


@pytest.mark.parametrize("target, grid", [(target, grid) for target, grids in IMAGES.items() for grid in grids])
def test_grids_with_an_exact_image(target, grid):
    assert fit(Quant(grid), target, SHAPE).scale.dtype == LAYOUTS[target].dtype


@given(st.integers(0, 2**31), st.integers(-6, 3), st.sampled_from(list(LAYOUTS)))
@settings(max_examples=60, deadline=None)
def test_the_formats_own_quant_fits(seed, size, target):
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed)) * 10.0**size
    tensor = TARGETS[target].quantize(x)
    assert why_not(TARGETS[target], target, SHAPE) is None and why_not(tensor, target) is None
    assert same(packed(tensor, target), LAYOUTS[target], tensor)


OFFSET, ZERO = MinMax("offset"), Learned(MinMax())
AFFINE = {
    "two levels beside a coarser group": ("q4_k", Quant(Uniform(4, False), Group(64), OFFSET)),
    "one level, an offset a channel": ("q4_k", Quant(Uniform(4, False), PerChannel(), OFFSET)),
    "2 bits with an offset": ("q2_k", Quant(Uniform(2, False), Group(16), OFFSET)),
    "fewer bits with an offset": ("q5_k", Quant(Uniform(3, False), Group(32), OFFSET)),
    "an integer zero as the minimum": ("q4_k", Quant(Uniform(4, False), Group(256), ZERO)),
    "an integer zero as the minimum, 2 bits": ("q2_k", Quant(Uniform(2, False), PerChannel(), ZERO)),
    "an integer zero, 5 bits": ("q5_k", Quant(Uniform(5, False), PerTensor(), ZERO)),
    "an integer zero in the code": ("q5_0", Quant(Uniform(4, False), Group(32), ZERO)),
    "an integer zero in the code of a signed grid": ("q8_0", Quant(Uniform(7), Group(32), ZERO)),
    "an integer zero in the code, beside an offset": ("q5_1", Quant(Uniform(4, False), Group(32), ZERO)),
    "an integer zero in the code, two levels": ("q6_k", Quant(Uniform(5, False), Group(16), ZERO)),
    "an integer zero in the code, two levels with a minimum": ("q5_k", Quant(Uniform(4, False), Group(32), ZERO)),
    "fp16 offsets": ("q4_1", Quant(Uniform(3, False), Group(64), OFFSET)),
    "signed steps": ("q4_k", Quant(Uniform(4), Group(256), AbsMax(sign="free"))),
    "half steps of half steps": ("q2_k", Quant(HalfStep(2), Group(32), AbsMax())),
    "seven halves in two levels": ("q4_k", Quant(HalfStep(3), Group(32), AbsMax())),
}


@pytest.mark.parametrize("case", AFFINE)
@pytest.mark.parametrize("far", [0.0, 1.5, -1.5])
def test_zeros_and_offsets_that_a_block_holds(case, far):
    target, quant = AFFINE[case]
    fitted = fit(quant, target, SHAPE)
    assert (fitted.grid, fitted.grain, type(fitted.scale)) == (quant.grid, quant.grain, type(quant.scale))
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 1, SHAPE[0])[:, None] + far
    quantizer = fitted.build().initialise(x)
    tensor = quantizer.quantize(x)
    assert torch.equal(tensor.dequantize(), quantizer(x)) and same(packed(tensor, target), LAYOUTS[target], tensor)


def test_a_negative_step_travels():
    tensor = Quant(Uniform(4), Group(256), AbsMax(dtype="float16", sign="free")).quantize(torch.randn(2, 512))
    tensor.scale = -tensor.scale
    for target in ("q4_k", "q4_1", "q4_0"):
        assert same(packed(tensor, target), LAYOUTS[target], tensor)


def test_outside_of_the_blocks_another_type_may_serve():
    eight = Quant(Uniform(8), Group(32), AbsMax())
    assert fit(eight, "tq2_0", SHAPE, body=False) == fit(eight, "q8_0", SHAPE)
    four = weight(4, Group(32))
    assert fit(four, "tq1_0", SHAPE, body=False) == fit(four, "q4_0", SHAPE)      # not MXFP4, whose steps are powers of two
    assert fit(weight(1.58), "q8_0", SHAPE, body=False) == fit(weight(1.58), "q8_0", SHAPE)      # the target, where it holds it
    odd = Quant(Uniform(8), Group(24), AbsMax())
    assert fit(odd, "q8_0", (4, 48), body=False) == odd            # in full


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
    "an offset beside a signed grid": (Quant(Uniform(4), Group(32), MinMax("offset")), "q4_1", SHAPE, "signed=False"),
    "a zero that is no fp16 offset": (Quant(Uniform(4, False), Group(32), MinMax()), "q4_1", SHAPE, "zero point"),
    "a zero in two levels": (Quant(Uniform(2, False), Group(16), MinMax()), "q2_k", SHAPE, "zero point"),
    "two levels of another grid": (Quant(Uniform(4), Group(32), AbsMax(nested=Quant(Uniform(8), Group(8)))), "q4_k", SHAPE, "0 .. 63"),
    "two levels of another group": (Quant(Uniform(4), Group(32), AbsMax(nested=Quant(Uniform(6, False), Group(4)))), "q4_k", SHAPE, "one fp16 step"),
    "group 16 in sub-blocks of 32": (Quant(Uniform(4), Group(16), AbsMax()), "q4_k", SHAPE, "multiple of 32"),
    "a group between": (Quant(Uniform(4), Group(96), AbsMax()), "q4_k", (4, 768), "no multiple of 96"),
    "fifteen halves in two levels": (Quant(HalfStep(4), Group(32), AbsMax()), "q4_k", SHAPE, "Q4_K"),
    "no E2M1": (Quant(Uniform(4), Group(32), AbsMax()), "mxfp4", SHAPE, "E2M1"),
    "no number of the table": (Quant(Uniform(4), Group(32), HALF), "iq4_nl", SHAPE, "16 numbers of the table"),
    "a table in integers": (Quant(IQ4_NL, Group(32), HALF), "q4_0", SHAPE, "over a power of two"),
    "bf16 of int4": (Quant(Uniform(4), Group(32), HALF), "bf16", SHAPE, "8 bits"),
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
        with pytest.raises(FormatError, match="nearest: gguf:q4_"):
            call(weight(4), "q4_2", SHAPE)
