import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qatlas.export.gguf.layout import LAYOUTS

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "gguf.npz")
CASES = json.loads(bytes(GOLDEN["params_json"]))
OURS = {layout.type: layout for layout in LAYOUTS.values()}


@pytest.mark.parametrize("case", [name for name, params in CASES.items() if params.get("type") in OURS])
def test_bytes_are_those_of_the_package(case):
    layout, rows = OURS[CASES[case]["type"]], torch.from_numpy(GOLDEN[f"{case}/bytes"])
    q, d = layout.unpack(rows)
    values = d.repeat_interleave(layout.size, -1) * q
    assert torch.equal(values, torch.from_numpy(GOLDEN[f"{case}/deq"]))
    assert torch.equal(layout.pack(q, d), rows)


@pytest.mark.parametrize("name", LAYOUTS)
@given(data=st.data())
def test_unpack_undoes_pack(name, data):
    layout = LAYOUTS[name]
    rows, blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    made = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    q = torch.randint(layout.low, layout.high + 1, (rows, blocks * layout.size), generator=made, dtype=torch.int16)
    d = torch.randn(rows, blocks, generator=made).half().float()
    packed = layout.pack(q, d)
    back, steps = layout.unpack(packed)
    assert torch.equal(back, q) and torch.equal(steps, d)
    read = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[layout.type])
    assert np.array_equal(read, (d.repeat_interleave(layout.size, -1) * q).numpy())
