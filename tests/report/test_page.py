"""The page: whole for every record, safe with every text, the same each time, and in need of nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from records import bare, broken, classifier, llama

from qatlas.core.error import RunError
from qatlas.record import Record
from qatlas.report import drawable, figure, report, save_figures

RECORDS = {"llama": llama, "large": lambda: llama(28), "bare": bare, "classifier": classifier, "broken": broken}
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags in order, their attributes, the text outside of <style>; unclosed or crossed tags fail."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += "" if self.open[-1:] == ["style"] else data


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Name -> the text of its page."""
    out = tmp_path_factory.mktemp("pages")
    return {name: report(make(), out / f"{name}.html").read_text("utf-8") for name, make in RECORDS.items()}


@pytest.mark.parametrize("name", RECORDS)
def test_page_is_whole(pages, name):
    page = Page(pages[name])
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert [tag for tag, _ in page.tags].count("svg") == len(drawable(RECORDS[name]()))
    assert "qatlas run lsq" in page.text


@pytest.mark.parametrize("name", RECORDS)
def test_page_needs_nothing_else(pages, name):
    tags = Page(pages[name]).tags
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in tags}
    assert "http:" not in pages[name] and "https:" not in pages[name] and "//" not in "".join(re.findall(r"<style.*?</style>", pages[name], re.S))
    for _, attrs in tags:
        assert not any(key.startswith("on") or key in ("src", "srcset", "action", "data") for key in attrs)
        assert str(attrs.get("href", "#")).startswith("#")
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", str(attrs)))


@pytest.mark.parametrize("name", RECORDS)
def test_figures_are_valid_svg_and_have_words(pages, name):
    for drawing in re.findall(r"<svg.*?</svg>", pages[name], re.S):
        root = ElementTree.fromstring(drawing)
        ids = {element.get("id") for element in root.iter()}
        used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", drawing))
        assert used <= ids
        assert root.get("role") == "img" and len(root.get("aria-label")) > 20
        assert not re.search(r"#[0-9a-f]{6}", re.sub(r"\"#[^\"]*\"|url\([^)]*\)", "", drawing)), "a colour that dark mode does not know"


@pytest.mark.parametrize("name", RECORDS)
def test_same_record_same_bytes(pages, name, tmp_path):
    assert report(RECORDS[name](), tmp_path / "again.html").read_text("utf-8") == pages[name]


def test_record_from_json_gives_the_same_page(pages, tmp_path):
    again = Record(**json.loads(json.dumps(dataclasses.asdict(llama()))))
    assert report(again, tmp_path / "r.html").read_text("utf-8") == pages["llama"]


def test_page_stands_alone_in_its_folder(tmp_path):
    path = report(llama(), tmp_path / "new" / "report.html")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert path == tmp_path / "new" / "report.html"


def test_headline_has_ratios_sizes_and_times(pages):
    text = re.sub(r"\s+", " ", Page(pages["llama"]).text)
    for words in ("24.10", "1.413×", "4,987", "292.5×", "9.21 MB", "4.0× smaller", "1 min 32 s", "Both proofs passed", "9f2c41d07be6a835", "1.43 GB"):
        assert words in text
    stages = re.search(r'<table class="headline">.*?</table>', pages["llama"], re.S)[0]
    assert re.findall(r'<th scope="row">(.*?)</th>', stages) == list(llama().scores)


def test_accuracy_is_in_percent(pages):
    text = Page(pages["classifier"]).text
    assert "91.87 %" in text and "0.987×" in text and "Samples" not in text and "Proofs" not in text and ">size<" not in pages["classifier"]


def test_missing_parts_are_left_out(pages):
    text = Page(pages["bare"]).text
    for heading in ("Results", "Figures", "Proofs", "Samples", "Coverage", "None", "nan"):
        assert heading not in text


def test_odd_values_are_said_in_words(pages):
    text = Page(pages["broken"]).text
    assert "not a number" in text and "infinite" in text and "loss is not finite at step 121" in text and "the run went wrong" in text
    assert "1 of 4 proofs failed" in text and "✗ FAILED" in text and "not judged" in text
    assert "\x00" not in pages["broken"]


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "</pre></svg><h1>owned", "{{ 7*7 }}",
                                  "a\ud800b\x07c", "$\\frac{1}{0}$ &lt;"])
def test_untrusted_text_is_only_text(tmp_path, evil):
    record = llama()
    plain_tags = [tag for tag, _ in Page(report(llama(), tmp_path / "plain.html").read_text("utf-8")).tags]
    record.samples = dict.fromkeys(record.samples, evil)
    record.paper = record.model = record.command = record.fingerprint = evil
    record.scores = {evil if name == "packed" else name: value for name, value in record.scores.items()}
    record.sizes = {evil if name == "packed" else name: value for name, value in record.sizes.items()}
    record.proofs[0] |= dict.fromkeys(("what", "reader", "result", "reason"), evil)
    record.errors = {evil + name if "up" in name else name: pair for name, pair in record.errors.items()}
    record.coverage[0] |= {"name": evil, "weight": evil}
    record.arguments |= {evil: evil}
    page = Page(report(record, tmp_path / "evil.html").read_bytes().decode("utf-8"))
    html = [tag for tag, _ in page.tags if tag not in ("dt", "dd", "g", "path", "text", "use", "tspan", "defs", "clippath", "rect", "br")]
    assert set(html) <= set(plain_tags)
    assert html.count("h1") == 1 and html.count("script") == 0 and html.count("svg") == 4
    if evil.isascii() and "\x07" not in evil:
        assert evil in page.text


def test_coverage_tells_of_layers_that_never_ran(tmp_path):
    record = llama()
    record.coverage[3]["calls"] = [1, 0]
    text = report(record, tmp_path / "r.html").read_text("utf-8")
    assert "never called" in text and "28 of 30 matrices quantized" in text


def test_no_two_columns_of_a_table_have_one_heading(tmp_path):
    text = report([llama(), classifier()], tmp_path / "r.html").read_text("utf-8")
    for table in re.findall(r"<thead>.*?</thead>", text, re.S):
        heads = re.findall(r"<th [^>]*>(.*?)</th>", table)
        assert len(heads) == len(set(heads))
    for head in ("trained to full precision", "perplexity to full precision", "accuracy to full precision", "size to full precision"):
        assert f">{head}<" in text
    assert ">to full precision<" not in text


def test_signals_inside_attention_have_rows(pages, tmp_path):
    record = llama()
    record.signals = [{"address": "model.layers.0.self_attn:key", "quant": "Uniform 8b", "calls": [1, 1]},
                      {"address": "model.layers.0.self_attn:<b>", "quant": "Uniform 7b", "calls": [1, 0]}]
    text = report(record, tmp_path / "r.html").read_text("utf-8")
    assert "2 signals inside attention quantized" in text and "self_attn:key" in text and "Uniform 7b" in text
    assert "self_attn:&lt;b&gt;" in text and "never called" in text and "signals inside" not in pages["llama"]


def test_several_records_share_one_page(tmp_path):
    records = [llama(), classifier(), broken(), bare()]
    page = Page(report(records, tmp_path / "many.html").read_text("utf-8"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and {"r0", "r1", "r2", "r3"} <= set(ids)
    assert "4 runs" in page.text and "✗ 1 failed" in page.text
    assert "0 runs" in report([], tmp_path / "none.html").read_text("utf-8")


def test_several_fits_stand_in_a_row():
    record = llama()
    record.history = [record.history[0], {"loss": [2.0, 1.9], "lr": [1e-4, 1e-4]}, {}, {"loss": []}]
    axes = figure(record, "training").axes
    assert axes[0].get_xlim()[1] == 202


def test_figures_by_name(tmp_path):
    assert drawable(llama()) == ["scores", "training", "errors", "sizes"] and drawable(bare()) == []
    assert isinstance(figure(llama(), "scores"), Figure)
    with pytest.raises(RunError, match="nearest: scores"):
        figure(llama(), "score")
    with pytest.raises(RunError, match="has no numbers"):
        figure(bare(), "scores")
    paths = save_figures(llama(), tmp_path)
    assert [p.name for p in paths] == ["scores.png", "training.png", "errors.png", "sizes.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)


def test_scores_axis_is_logarithmic_only_over_orders_of_magnitude():
    record = llama()
    assert figure(record, "scores").axes[0].get_xscale() == "log"
    del record.scores["untrained"]
    assert figure(record, "scores").axes[0].get_xscale() == "linear"


def test_loss_on_another_scale_has_its_own_panel():
    assert len(figure(llama(), "training").axes) == 2
    assert len(figure(classifier(), "training").axes) == 3
    record = llama()
    record.history[0]["loss"] = [x / 20 for x in record.history[0]["loss"]]
    assert len(figure(record, "training").axes) == 3


def test_many_layers_fold_into_blocks():
    assert len(figure(llama(4), "errors").axes[0].get_yticks()) == 32
    assert len(figure(llama(28), "errors").axes[0].get_yticks()) == 28
    assert len(figure(llama(300), "errors").axes[0].get_yticks()) <= 60


def test_scales_that_the_last_rounding_moved_are_told(tmp_path):
    record = llama()
    record.rounded = {"a": (3, 8, 2e-4), "b": (0, 8, 0.0)}
    assert "moved 3 of 16, by at most 0.02 %." in report(record, tmp_path / "page.html").read_text()
    record.rounded = {"a": (0, 8, 0.0)}
    assert "moved 0 of 8." in report(record, tmp_path / "page.html").read_text()
