"""What a writer makes appears whole or not at all, and never over something else."""

import os

import pytest

from qatlas.core.error import FormatError
from qatlas.export.checkpoint import appearing


def write(aside, kind):
    if kind == "directory":
        aside.mkdir()
        aside = aside / "inside"
    aside.write_bytes(b"whole")


def named(folder):
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize("kind, made", [("file", ["new", "x"]), ("directory", ["inside", "new", "x"])])
def test_it_appears_at_the_end(tmp_path, kind, made):
    path = tmp_path / "new" / "x"
    with appearing(path) as aside:
        write(aside, kind)
        assert not path.exists() and aside.parent == path.parent
    assert named(tmp_path) == made and next(p for p in tmp_path.rglob("*") if p.is_file()).read_bytes() == b"whole"


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_writer_that_fails_leaves_nothing(tmp_path, kind):
    with pytest.raises(KeyError), appearing(tmp_path / "x") as aside:
        write(aside, kind)
        raise KeyError
    assert named(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("early", [True, False])
def test_what_is_in_the_way_stays(tmp_path, kind, early):
    """Also what someone else has made while we wrote."""
    path, begun = tmp_path / "x", []

    def block():
        write(path, kind)
        (path / "inside" if kind == "directory" else path).write_bytes(b"theirs")

    if early:
        block()
    with pytest.raises(FormatError, match="x exists; remove it"), appearing(path) as aside:
        begun.append(aside)
        write(aside, kind)
        block()
    assert bool(begun) is not early
    assert named(tmp_path) == (["inside", "x"] if kind == "directory" else ["x"])
    assert (path / "inside" if kind == "directory" else path).read_bytes() == b"theirs"


def test_an_empty_directory_gives_way_and_what_a_killed_writer_left_too(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / f".x.{os.getpid()}.part").mkdir()
    with appearing(tmp_path / "x") as aside:
        assert not aside.exists()
        write(aside, "directory")
    assert named(tmp_path) == ["inside", "x"]


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError

    monkeypatch.setattr(os, "link", link)
    with appearing(tmp_path / "x") as aside:
        write(aside, "file")
    assert named(tmp_path) == ["x"]
