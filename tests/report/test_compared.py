"""Table, figure and page of a comparison: what stands in them, what is left out, and that hostile names stay text."""

from __future__ import annotations

import math

from qatlas.report.compared import compared, in_words, page, picture, rows, table
from qatlas.trial import Trial, Trials


def trials(metric: str = "perplexity", lower: bool = True, name: str = "other") -> Trials:
    def run(entry: str, bits: float, seed: int, score: float) -> Trial:
        stages = {"untrained": {metric: 2 * score}, "trained": {metric: score}}
        command = f"qatlas run {entry} --bits={bits:g} --seed={seed}"
        return Trial(entry, bits, seed, command, entry, {}, stages, bits + 0.3, int(1000 * bits), 7.0 + bits)

    made = [run(entry, bits, seed, base * (8 - bits) + 0.01 * seed)
            for entry, base in (("lsq", 2.0), (name, 1.0)) for bits in (4.0, 2.0) for seed in range(3)]
    made.append(Trial("lsq", 1.0, 0, "", "lsq", refused="QuantError: LSQ has no bit of 1"))
    return Trials("zoo:gpt", "text", metric, lower, {metric: 3.0}, 16000, "lsq", "qatlas compare lsq", made, {name: "less is more"})


def test_the_table_has_a_row_for_each_cell_and_says_refusals():
    text = table(trials())
    assert text.count("\n") == 2 + 1 + 6 - 1                      # head, full precision, 2 x 2 cells and a refused one
    assert "refused: LSQ has no bit of 1" in text and "0.50" in text and "better in 3 of 3" in text and "| better |" in text
    assert [row["bits"] for row in rows(trials())] == ["4", "4", "2", "2", "1"]


def test_a_figure_has_a_line_for_each_paper_and_full_precision():
    left, right = picture(trials()).axes
    assert [t.get_text() for t in picture(trials()).legends[0].get_texts()] == ["lsq", "other"]
    assert left.get_yscale() == "log" and right.get_yscale() == "log"
    assert picture(trials("accuracy", False)).axes[0].get_yscale() == "linear"


def test_what_is_not_finite_is_not_drawn():
    found = trials()
    found.trials[:3] = [Trial("lsq", 4.0, seed, "", scores={"trained": {"perplexity": math.inf}}, bytes=5) for seed in range(3)]
    picture(found)
    assert "infinite" in table(found)


def test_the_page_is_one_file_and_escapes(tmp_path):
    path = page([trials(name="<script>alert(1)</script>"), trials("accuracy", False)], tmp_path / "page.html")
    text = path.read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and text.count("<figure>") == 2
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert "less is more" in text and "qatlas run lsq --bits=4 --seed=0" in text


def test_everything_is_written(tmp_path):
    assert compared(trials(), tmp_path / "deep" / "out").is_file()
    assert sorted(p.name for p in (tmp_path / "deep" / "out").iterdir()) == ["comparison.png", "report.html", "table.md", "trials.json"]
    assert "lsq at 4 bits" in in_words(trials())
