"""A run that is there is not repeated, and not mistaken for another."""

import json

import pytest
from scripts import script


def test_a_run_is_made_once(tmp_path):
    kept, made = script("kept").kept, []

    def make():
        made.append(1)
        return {"accuracy": 12.5}

    where = tmp_path / "a" / "one.json"
    first = kept(where, {"seed": 0}, make)
    assert first == kept(where, {"seed": 0}, make) == json.loads(where.read_text()) and len(made) == 1
    assert first["accuracy"] == 12.5 and first["seed"] == 0 and first["cpu seconds"] >= 0
    with pytest.raises(SystemExit, match="other settings"):
        kept(where, {"seed": 1}, make)
