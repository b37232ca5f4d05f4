"""An embedding of which a few rows are asked for says the same, and hears the same, as the whole table."""

import pytest
import torch
from torch import nn

from qatlas.core.grain import Group, PerChannel, PerTensor
from qatlas.core.grid import Ternary, Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, AbsMean, MinMax
from qatlas.layers.embedding import QEmbedding
from qatlas.layers.quantized import Slots

NESTED = AbsMax(nested=Quant(Uniform(6, False), PerTensor(), AbsMax()))
CASES = {"twn": (Quant(Ternary(0.7), PerChannel(), AbsMean(), refit=True, clip=0.5), True), "rows": (Quant(Uniform(8)), True),
         "groups": (Quant(Uniform(4, False), Group(8), MinMax()), True), "one scale": (Quant(Uniform(4), PerTensor(), AbsMax()), False),
         "one step of all scales": (Quant(Uniform(4), Group(8), NESTED), False)}
IDS = torch.tensor([[1, 2, 2, 0], [7, 0, 3, 49]])


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", ["each", "buffer", "recompute"])
def test_some_rows_are_as_the_table_says(case, padding, dtype, keep):
    quant, alone = CASES[case]

    def made():
        torch.manual_seed(0)
        return QEmbedding.of(nn.Embedding(50, 16, padding_idx=padding).to(dtype), Slots(weight=quant, keep=keep))

    some, whole = made(), made()
    assert some.by_row == (alone and keep == "each")
    y, wanted = some(IDS), whole.product(IDS, whole.computed())
    assert torch.equal(y, wanted) and y.dtype == wanted.dtype
    assert torch.equal(y, some.hard()[IDS]) and torch.equal(y, some.pack()(IDS))
    g = torch.randn(y.shape)
    y.backward(g)
    wanted.backward(g)
    torch.testing.assert_close(some.weight.grad, whole.weight.grad)
    assert padding is None or not some.weight.grad[padding].any()
    some.weight_quantizer.on = False
    assert torch.equal(some(IDS), some.weight[IDS])
