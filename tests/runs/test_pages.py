"""What is made from the code is up to date, and README's commands are the Makefile's."""

import re

from scripts import ROOT, script


def pages():
    return script("pages")


def test_pages_are_up_to_date():
    for path, text in pages().pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: python runs/pages.py"


def test_the_tree_has_a_line_for_each_file():
    made = pages()
    files = [p for p in made.SOURCE.rglob("*.py") if p.stat().st_size]
    assert len(made.tree().splitlines()) == len(files) + 2, "a file has no head"
    assert all(len(line) < 200 for line in made.tree().splitlines())


def test_readme_names_the_two_commands():
    readme, make = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    for command in ("demo", "test"):
        assert f"make {command}" in readme and f"\n{command}:" in make
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_shelf_has_a_row_for_each_paper_and_the_rest_of_a_text_stays():
    made = pages()
    from qatlas import papers

    rows = made.shelf().splitlines()[2:]
    assert all(f"[`{name}`](docs/papers/{name}.md)" in row for name, row in zip(papers.names(), rows, strict=True))
    assert made.between("a <!-- x -->\nold<!-- /x --> b", "x", "new\n") == "a <!-- x -->\nnew\n<!-- /x --> b"


def test_a_papers_page_ends_with_its_figures(tmp_path):
    made = pages()
    for file in ("lsq_b.png", "lsq_a_c.svg", "lsq_plus_d.png", "lsq_e.txt", "other_f.png"):
        (tmp_path / file).touch()
    names = ["lsq", "lsq_plus", "twn"]
    assert [path.name for path in made.figures("lsq", names, tmp_path)] == ["lsq_a_c.svg", "lsq_b.png"]
    assert [path.name for path in made.figures("lsq_plus", names, tmp_path)] == ["lsq_plus_d.png"]
    assert made.pictures(made.figures("lsq", names, tmp_path), "lsq") == (
        "\n## Figures\n\n![a c](../figures/lsq_a_c.svg)\n\n![b](../figures/lsq_b.png)\n")
    assert made.pictures(made.figures("twn", names, tmp_path), "twn") == "" and "## Figures" not in made.pictures([], "lsq")


def test_links_to_figures_lead_somewhere():
    made = pages()
    from qatlas import papers

    for name in papers.names():
        for link in re.findall(r"!\[[^\]]*\]\((.*?)\)", made.paper(name)):
            assert (ROOT / "docs" / "papers" / link).resolve().is_file(), link
