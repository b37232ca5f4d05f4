"""Blocks of GGUF, as the gguf package writes and reads them."""

from __future__ import annotations

from golden_cases import Answer, Case

from qatlas.core.grain import Group
from qatlas.core.grid import Uniform
from qatlas.core.qtensor import QTensor
from qatlas.export.gguf.layout import LAYOUTS


def gguf(c: Case) -> Answer:
    layout = {layout.type: layout for layout in LAYOUTS.values()}.get(c.p.get("type", ""))
    if layout is None:
        return None
    q, d = layout.unpack(c.a["bytes"])
    stored = QTensor(Uniform(8).encode(q.float()), d, None, None, Uniform(8), Group(layout.size))
    return {"bytes": layout.pack(q, d), "deq": stored.dequantize()}
