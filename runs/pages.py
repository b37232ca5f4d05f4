"""Pages that are made from the code: docs/papers/*.md from the papers' heads, and the tree in README.md from the first line of each file's head.

    python runs/pages.py          # write them; a test holds that they are up to date
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "qatlas"
BEGIN, END = "<!-- tree -->\n", "<!-- /tree -->"


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


def paper(name: str) -> str:
    """The page of a paper: its head as text, its function's arguments as a table."""
    from qatlas import papers

    module, function = papers.module(name), papers.paper(name)
    says = dict(re.findall(r"^\s*(\w+): (.*)$", inspect.getdoc(function) or "", re.M))
    rows = [f"| `--{p.name}` | `{p.default}` | {says.get(p.name, '')} |" for p in inspect.signature(function).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY]
    title, _, body = inspect.getdoc(module).partition("\n")
    flags = "\n".join(["| flag | default | |", "|---|---|---|", *rows])
    return (f"<!-- made by runs/pages.py from src/qatlas/papers/{name}.py -->\n# {title}\n\n{fenced(body.strip())}\n\n## Flags\n\n"
            f"`qatlas run {name} --model DIR --data FILE --out DIR`\n\n{flags}\n")


def fenced(text: str) -> str:
    """Indented formulas as code blocks."""
    return re.sub(r"((?:^ {4}.*\n?)+)", lambda m: "```\n" + inspect.cleandoc(m.group(1)) + "\n```\n", text, flags=re.M)


def pages() -> dict[Path, str]:
    """Path -> what should stand there."""
    from qatlas import papers

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = readme.split(BEGIN)
    made = {ROOT / "README.md": before + BEGIN + tree() + END + rest.split(END)[1]}
    return made | {ROOT / "docs" / "papers" / f"{name}.md": paper(name) for name in papers.names()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
