"""Spoilt files are refused: no crash, no hang, no memory, no code. Every format that is listed is asked (see fuzz.py, spoil.py).

    QATLAS_FUZZ=10000 python -m pytest tests/export/test_fuzz.py        # so many files, one artefact of every target
"""

import json
import os
import pickle
from pathlib import Path
from random import Random

import pytest
import spoil
from fuzz import APART, campaign

from qatlas.export import formats

COUNT = int(os.environ.get("QATLAS_FUZZ", "0"))


def test_spoilt_files_are_refused(tmp_path):
    found = campaign(tmp_path / "fuzz", COUNT or 240, seed=COUNT, every=bool(COUNT))
    assert not found["wrong"], json.dumps(found["wrong"], indent=1)
    assert {name.partition(":")[0] for name in found["artefacts"]} >= {*formats(), "packed", "trainable", "record"} - {*APART}
    outcomes = found["outcomes"]
    assert sum(sum(each.values()) for each in outcomes.values()) == (COUNT or 240)
    assert all(each["refused"] for each in outcomes.values()), "a mutation that nobody notices tests nothing"


@pytest.mark.parametrize("kind", [*spoil.BYTES])
def test_a_number_names_a_file(kind):
    whole = bytearray(b"GGUF" + b"general.name" * 40)
    first, again = (spoil.BYTES[kind](Random(3), bytearray(whole)) for _ in range(2))
    assert first == again != whole


@pytest.mark.parametrize("kind", [*spoil.TEXT])
def test_json_changes(kind):
    text = json.dumps({"a": {"b": [1, 2]}, "c": "d"})
    assert spoil.TEXT[kind](Random(1), text) != text


def test_the_pickle_would_do_harm(tmp_path):
    """That nothing happened proves something only because something would."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(spoil.Harm(canary))).close()
    assert canary.exists() and Path(spoil.__file__).is_file()
