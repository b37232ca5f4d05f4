"""Nouns: values that go to JSON and back, and a reader that imports nothing foreign."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from parts import nouns

from qatlas.core.error import CheckpointError
from qatlas.core.grid import Ternary, Uniform
from qatlas.core.noun import MOVED, Noun, from_json


@pytest.mark.parametrize("noun", nouns(), ids=str)
def test_every_noun_goes_to_json_and_back(noun: Any) -> None:
    text = json.dumps(noun.to_json(), allow_nan=False)
    again = from_json(json.loads(text))
    assert again == noun and type(again) is type(noun) and hash(again) == hash(noun)
    assert json.dumps(again.to_json()) == text
    with pytest.raises(dataclasses.FrozenInstanceError):
        noun.nothing = 1


def test_the_list_is_not_empty() -> None:
    names = {type(noun).__name__ for noun in nouns()}
    assert {"Uniform", "Float", "Group", "Learned", "Trust", "Hadamard", "Chain", "Quant", "Scheme"} <= names


def test_defaults_are_left_out_and_types_are_kept() -> None:
    assert Uniform(4).to_json() == {"is": "core.grid:Uniform", "bits": 4}
    assert Ternary().to_json() == {"is": "core.grid:Ternary"}
    assert Uniform(4).but(signed=None).to_json()["signed"] is None
    assert from_json([1, {"a": 2}, [3]]) == (1, {"a": 2}, (3,))


@pytest.mark.parametrize("old", MOVED)
def test_what_has_moved_is_found_where_files_of_before_look_for_it(old):
    part = next(noun for noun in nouns() if noun.to_json()["is"] == MOVED[old] != old)
    assert from_json(part.to_json() | {"is": old}) == part


@pytest.mark.parametrize("address", ["os:system", "subprocess:Popen", "core.grid:Nothing", "core.grid:QuantError", "core.grid:torch",
                                     "core.nowhere:Uniform", "core.noun:Noun",
                                     "", ":", "core.grid", "..os:system", "core.grid:Uniform:more", None, 3])
def test_foreign_classes_are_refused(address: Any) -> None:
    with pytest.raises(CheckpointError, match="no part of qatlas"):
        from_json({"is": address})


def test_foreign_modules_are_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError):
        from_json({"is": "foreign_module:Grid"})
    assert "foreign_module" not in sys.modules


def test_a_noun_of_the_users_own_is_found_once_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_paper.py").write_text(textwrap.dedent("""
        from dataclasses import dataclass
        from qatlas.core.noun import Noun
        @dataclass(frozen=True)
        class Mine(Noun):
            size: int = 1
    """))
    monkeypatch.syspath_prepend(tmp_path)
    data = {"is": "users_paper:Mine", "size": 3}
    with pytest.raises(CheckpointError, match="import the paper's file first"):
        from_json(data)
    import users_paper  # type: ignore[import-not-found]
    assert from_json(data) == users_paper.Mine(3)
    assert users_paper.Mine(3).to_json() == data
    del sys.modules["users_paper"]


def test_a_field_of_tomorrow_is_named() -> None:
    with pytest.raises(CheckpointError, match="no field shiny; it has bits, narrow, signed"):
        from_json({"is": "core.grid:Uniform", "bits": 4, "shiny": 1})


def test_a_missing_field_is_named() -> None:
    with pytest.raises(CheckpointError, match="core.grid:Uniform lacks bits"):
        from_json({"is": "core.grid:Uniform"})


def test_but_changes_a_copy() -> None:
    one = Uniform(4)
    assert one.but(bits=2) == Uniform(2) and one == Uniform(4) and isinstance(one, Noun)
