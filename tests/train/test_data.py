"""Reading: each form of file, and what is said when it is not as it should be."""

import json

import numpy as np
import pytest

from qatlas.core.error import DataError
from qatlas.train import data

ROWS = [{"sentence": f"row {i}", "label": i % 2} for i in range(40)]


def write(path, rows=ROWS):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        path.write_text("sentence,label\n" + "".join(f"{row['sentence']},{row['label']}\n" for row in rows))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_tables_of_each_form_are_the_same(tmp_path, suffix):
    found = data.table(write(tmp_path / f"rows{suffix}"), columns=["sentence", "label"])
    assert len(found.train["label"]) == 38 and len(found.held_out["label"]) == 2
    rows = zip(*[found.train[k] + found.held_out[k] for k in ("sentence", "label")], strict=True)
    assert sorted(rows) == sorted((r["sentence"], r["label"]) for r in ROWS)
    assert found.fingerprint == data.table(write(tmp_path / "again.jsonl")).fingerprint


def test_a_held_out_file_of_its_own(tmp_path):
    found = data.table(write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", ROWS[:3]))
    assert len(found.train["label"]) == 40 and found.held_out["sentence"] == ["row 0", "row 1", "row 2"]


def test_text(tmp_path):
    (tmp_path / "a.txt").write_text("line of text\n" * 100)
    found = data.text(str(tmp_path / "a.txt"))
    assert found.train + found.held_out == "line of text\n" * 100 and found.train.endswith("\n") and 40 < len(found.held_out) < 90
    (tmp_path / "b.md").write_text("other")
    assert data.text(str(tmp_path / "a.txt"), str(tmp_path / "b.md")).held_out == "other"
    rows = write(tmp_path / "c.jsonl", [{"text": "one"}, {"text": "two"}])
    assert "".join(vars(data.text(rows)).values()) == "one\n\ntwo"
    assert found.fingerprint != data.text(str(tmp_path / "b.md")).fingerprint


def test_the_builtin_text():
    pytest.importorskip("qatlas.model.zoo")
    found = data.text("builtin:docs")
    assert len(found.train) > len(found.held_out) > 1000


def test_npz(tmp_path):
    x, y = np.zeros((6, 4, 4), np.uint8), np.arange(6)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
    found = data.table(str(tmp_path / "a.npz"))
    assert found.train["x"].shape == (6, 4, 4) and found.held_out["y"].tolist() == [0, 1]
    np.savez(tmp_path / "pickled.npz", x=np.array([object()], dtype=object))
    with pytest.raises(DataError, match="cannot be read as .npz"):
        data.table(str(tmp_path / "pickled.npz"))


def test_a_directory_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl")
    write(folder / "test.jsonl", ROWS[:4])
    found = data.table(str(folder))
    assert len(found.train["label"]) == 40 and found.held_out["label"] == [0, 1, 0, 1]


@pytest.mark.parametrize("make, said", [
    (lambda d: str(d / "missing.jsonl"), "there is no file"),
    (lambda d: (d / "a.txt").touch() or str(d / "a.txt"), "is empty"),
    (lambda d: (d / "a.txt").write_text("  \n") and str(d / "a.txt"), "holds no text"),
    (lambda d: (d / "a.txt").write_bytes(b"\xff\xfe\x00") and str(d / "a.txt"), "not UTF-8"),
    (lambda d: write(d / "a.jsonl"), "no column 'text'; found: sentence, label"),
    (lambda d: (d / "a.parquet").write_text("no") and str(d / "a.parquet"), "cannot be read as .parquet"),
    (lambda d: (d / "a.jsonl").write_text('{"text": ') and str(d / "a.jsonl"), "cannot be read as .jsonl"),
    (lambda d: "builtin:dosc", "nearest: builtin:docs"),
])
def test_text_errors(tmp_path, make, said):
    with pytest.raises(DataError, match=said):
        data.text(make(tmp_path))


@pytest.mark.parametrize("make, said", [
    (lambda d: write(d / "a.jsonl", [{"sentence": "x"}] * 3), "no column 'label'; found: sentence"),
    (lambda d: (d / "a.json").write_text("[]") and str(d / "a.json"), "no column|holds no rows"),
    (lambda d: (d / "a.json").write_text("[1, 2]") and str(d / "a.json"), "must hold objects"),
    (lambda d: write(d / "a.jsonl", ROWS[:1]), "one row is too few"),
    (lambda d: (d / "a.json").write_text('{"sentence": ["a"], "label": [1, 2]}') and str(d / "a.json"), "unequal length"),
    (lambda d: "builtin:docs", "is a text, not a table"),
])
def test_table_errors(tmp_path, make, said):
    with pytest.raises(DataError, match=said):
        data.table(make(tmp_path), columns=["sentence", "label"])


def test_what_is_nowhere_is_said_to_be_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="is no file here"):
        data.table(str(tmp_path / "nowhere"))


def test_a_text_of_one_long_line_is_cut_near_its_last_twentieth(tmp_path):
    (tmp_path / "a.txt").write_text("title\n" + "a " * 5000)
    found = data.text(str(tmp_path / "a.txt"))
    assert len(found.held_out) < len(found.train) / 9
