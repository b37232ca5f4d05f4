"""Blocks of GGUF, as the gguf package writes and reads them."""

from __future__ import annotations

from golden_cases import Answer, Case

from qatlas.export.gguf.layout import LAYOUTS, from_bytes, to_bytes


def gguf(c: Case) -> Answer:
    kind = c.p.get("type", "")
    if kind == "BF16":
        values = from_bytes(c.a["bytes"].unflatten(-1, (-1, 2)), "bfloat16")
        return {"bytes": to_bytes(values, "bfloat16").flatten(-2), "deq": values}
    layout = {layout.type: layout for layout in LAYOUTS.values()}.get(kind)
    if layout is None:
        return None
    own = layout.unpack(c.a["bytes"])
    return {"bytes": layout.pack(own), "deq": own.dequantize()}
