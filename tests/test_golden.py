"""Our parts held against the authors' numbers.

The vectors were made by the authors' own code (tests/golden/README.md; all of them lie in the folder that QATLAS_GOLDEN names). A *map* says which
public parts of ours mean the same as a case, from its kind and parameters alone, and computes nothing itself: what is compared is what a user gets.
Every output of a case must be answered, or its name stands in the map's LACKS.

Each case ends in one of three ways (some only hold the inputs of others), printed at the end of the run (tests/conftest.py):

    passed      every output agrees: float64 to 1e-12, float32 to 2e-6, sums to 1e-5
    refused     we do not reproduce it, in whole or at some places; REFUSED holds the reason. What is not refused of it is still compared
    uncovered   no public part says it yet: the map answers None, or there is no map. It comes with its paper

    golden_cases.py      a case, read from its file; the comparing
    golden_refused.py    the table of refusals
    golden_means.py      what maps are written with
    golden_maps/         one map for each file of vectors, by its name
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_maps
import pytest
from golden_cases import Case, any_of, apart, differ, read
from golden_refused import REFUSED

FOLDER = Path(os.environ.get("QATLAS_GOLDEN") or Path(__file__).parent / "golden")
CASES = [case for path in sorted(FOLDER.glob("*.npz")) for case in read(path)]


@pytest.mark.parametrize("c", CASES, ids=lambda c: f"{c.file}-{c.name}")
def test_golden(c: Case, record_property: Callable[[str, Any], None]) -> None:
    arrays = c.rest.get(c.p.get("input", ""), {}) | c.a           # some files keep the inputs of many cases in one
    refused = [r for r in REFUSED if r.file == c.file and r.when(c.p, arrays)]
    record_property("golden", (c.file, c.kind))
    whole = [r.reason for r in refused if r.within is None and r.where(c.p, arrays) is True]
    if set(c.a) <= {"x", "grad_out"} or c.kind in ("inputs", "student"):
        record_property("outcome", "only inputs")
        pytest.skip("the inputs of other cases")
    answer = golden_maps.map_of(c.file)(c) if c.file in golden_maps.names() and not whole else None
    if answer is None:
        record_property("outcome", f"refused: {whole[0]}" if whole else "uncovered")
        pytest.skip(whole[0] if whole else "uncovered")
    places = [r.where(c.p, arrays) for r in refused if r.within is None]
    within = max((r.within for r in refused if r.within is not None), default=None)
    outputs = {name for name in c.a if name[0] in "yq" or name in ("deq", "fake", "bytes") or name.startswith(("grad_", "packed"))} - {"grad_out"}
    outputs |= {name for name in c.a if c.file == "teacher_intervention" and not name.startswith("w:")}
    missing = outputs - set(answer) - golden_maps.lacks(c.file)
    assert not missing, f"the map answers {sorted(answer)} but not {sorted(missing)}"
    wrong = {name: how for name, ours in answer.items() if name in c.a and (how := differ(c, name, ours, apart(places, name), within))}
    assert not wrong, wrong
    partly = [r.reason for r, place in zip((r for r in refused if r.within is None), places, strict=True) if any_of(place)]
    partly += [r.reason for r in refused if r.within is not None]
    record_property("outcome", f"passed, but for: {partly[0]}" if partly else "passed")
