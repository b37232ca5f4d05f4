"""Pages that are made from the code: docs/papers/*.md from the papers' heads; README's shelf and tree from the first line of each head;
docs/exports.md from what the targets answer (runs/exports.py).

A paper's page ends with the figures docs/figures/<paper>_*.png and .svg, where there are any.

    python runs/pages.py          # write them; a test holds that they are up to date
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "qatlas"


def head(path: Path) -> str:
    """A file's docstring."""
    return inspect.cleandoc(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


def first(path: Path) -> str:
    """The first sentence of a file's head."""
    line = re.split(r"(?<=[.:?])\s", head(path).replace("\n", " "), maxsplit=1)[0]
    text = re.sub(r"^([A-Z][\w ,]{0,40}|qatlas): ", "", head(path).replace("\n", " ")) if line.endswith(":") else line
    return re.split(r"(?<=[.?])\s", text, maxsplit=1)[0].rstrip(".:")


def tree() -> str:
    """One line for each file of the source."""
    rows = []
    for path in sorted(SOURCE.rglob("*.py"), key=lambda p: (len(p.relative_to(SOURCE).parts) == 1, str(p.relative_to(SOURCE)))):
        if path.stat().st_size and head(path):
            rows.append((str(path.relative_to(SOURCE)), first(path)))
    wide = max(len(name) for name, _ in rows)
    return "```\n" + "\n".join(f"{name:{wide}}  {text}" for name, text in rows) + "\n```\n"


def shelf() -> str:
    """One row for each paper: its title, and what its argument `bits` says."""
    from qatlas import papers

    rows = [f"| [`{name}`](docs/papers/{name}.md) | {first(SOURCE / 'papers' / f'{name}.py')} | {says(name).get('bits', '').rstrip('.')} |"
            for name in papers.names()]
    return "\n".join(["| paper | what | bits |", "|---|---|---|", *rows]) + "\n"


def says(name: str) -> dict[str, str]:
    """Argument of a paper's function -> its line in the docstring."""
    from qatlas import papers

    return dict(re.findall(r"^\s*(\w+): (.*)$", inspect.getdoc(papers.paper(name)) or "", re.M))


def between(text: str, mark: str, made: str) -> str:
    """A text with what stands between <!-- mark --> and <!-- /mark --> made anew."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    before, rest = text.split(begin)
    return before + begin + made + end + rest.split(end)[1]


def paper(name: str) -> str:
    """The page of a paper: its head as text, its function's arguments as a table."""
    from qatlas import papers

    module, function = papers.module(name), papers.paper(name)
    told = says(name)
    rows = [f"| `--{p.name}` | `{p.default}` | {told.get(p.name, '')} |" for p in inspect.signature(function).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY]
    title, _, body = inspect.getdoc(module).partition("\n")
    flags = "\n".join(["| flag | default | |", "|---|---|---|", *rows])
    return (f"<!-- made by runs/pages.py from src/qatlas/papers/{name}.py -->\n# {title}\n\n{fenced(body.strip())}\n\n## Flags\n\n"
            f"`qatlas run {name} --model DIR --data FILE --out DIR`\n\n{flags}\n{pictures(figures(name, papers.names()), name)}")


def figures(name: str, names: list[str], folder: Path = ROOT / "docs" / "figures") -> list[Path]:
    """The figures of a paper, <paper>_<what>.png or .svg; a file belongs to the paper with the longest name that it begins with."""
    files = [path for path in sorted(folder.glob(f"{name}_*")) if path.suffix in (".png", ".svg")]
    return [path for path in files if name == max((n for n in names if path.name.startswith(f"{n}_")), key=len)]


def pictures(files: list[Path], name: str) -> str:
    """The end of a paper's page: its figures, if it has any."""
    shown = "".join(f"\n![{path.stem.removeprefix(f'{name}_').replace('_', ' ')}](../figures/{path.name})\n" for path in files)
    return f"\n## Figures\n{shown}" if shown else ""


def fenced(text: str) -> str:
    """Indented formulas as code blocks."""
    return re.sub(r"((?:^ {4}.*\n?)+)", lambda m: "```\n" + inspect.cleandoc(m.group(1)) + "\n```\n", text, flags=re.M)


def pages() -> dict[Path, str]:
    """Path -> what should stand there."""
    from qatlas import papers

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    made = {ROOT / "README.md": between(between(readme, "shelf", shelf()), "tree", tree())}
    made |= {ROOT / "docs" / "papers" / f"{name}.md": paper(name) for name in papers.names()}
    return made | {ROOT / "docs" / "exports.md": sibling("exports").page()}


def sibling(name: str) -> Any:
    """Another script of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "runs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
