import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlas.export.gguf.layout import LAYOUTS

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "gguf.npz")
CASES = json.loads(bytes(GOLDEN["params_json"]))
OURS = {layout.type: layout for layout in LAYOUTS.values()}


@pytest.mark.parametrize("case", [name for name, params in CASES.items() if params.get("type") in OURS])
def test_bytes_are_those_of_the_package(case):
    layout, rows = OURS[CASES[case]["type"]], torch.from_numpy(GOLDEN[f"{case}/bytes"])
    own = layout.unpack(rows)
    assert torch.equal(own.dequantize(), torch.from_numpy(GOLDEN[f"{case}/deq"]))
    assert torch.equal(layout.pack(own), rows)


def drawn(layout, rows, blocks, seed):
    """Random bytes, but for the steps: numbers, and no code that an encoder never writes."""
    made = torch.Generator().manual_seed(seed)
    widths, parts = layout.widths(), []
    for name, width in widths.items():
        part = torch.randint(0, 256, (rows, blocks, width), generator=made, dtype=torch.uint8)
        if name in "dm":
            sizes = 10.0 ** -torch.randint(0, 8, (rows, blocks, 1), generator=made)
            part = (torch.randn(rows, blocks, 1, generator=made) * sizes).half().view(torch.uint8)
            part = part[..., :1] % 255 if layout.dtype != "float16" else part
        if name == "q" and len(layout.grid.values()) < 2**layout.grid.bits:
            codes = layout.grid.encode(layout.grid.values())
            part = layout.spread(codes[torch.randint(0, len(codes), (rows, blocks, layout.size), generator=made)])
        parts.append(part)
    return torch.cat(parts, -1).flatten(-2)


@pytest.mark.parametrize("name", LAYOUTS)
@given(rows=st.integers(1, 3), blocks=st.integers(1, 3), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_any_bytes_mean_what_the_package_says_and_come_back(name, rows, blocks, seed):
    layout = LAYOUTS[name]
    packed = drawn(layout, rows, blocks, seed)
    own = layout.unpack(packed)
    read = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[layout.type])
    assert own.shape == (rows, blocks * layout.size) and np.array_equal(read, own.dequantize().numpy())
    assert torch.equal(layout.pack(own), packed)


@pytest.mark.parametrize("name", LAYOUTS)
def test_sizes_are_those_of_the_package(name):
    layout = LAYOUTS[name]
    kind = gguf.GGMLQuantizationType[layout.type]
    assert gguf.GGML_QUANT_SIZES[kind] == (layout.size, sum(layout.widths().values()))
    assert gguf.LlamaFileType(layout.file_type).name.startswith(f"MOSTLY_{layout.type}")


def test_the_smallest_stands_first():
    assert [layout.bits for layout in LAYOUTS.values()] == sorted(layout.bits for layout in LAYOUTS.values())
