"""Draw the architecture as an SVG: the floors of the import contract, with what each package says of itself.

``python -m tests.architecture.draw`` writes ``subspace/architecture.svg``, which the README shows.
"""

from __future__ import annotations

import ast
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "subspace" / "architecture.svg"

WIDTH, MARGIN, GAP = 960, 16, 8
FLOOR, HEAD = 58, 64
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.name { font: 600 14px ui-monospace, monospace }
.note { font-size: 12px; fill: #57606a }
rect { fill: #f6f8fa; stroke: #8c959f }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .note { fill: #9198a1 } rect { fill: #151b23; stroke: #656c76 }
}
"""


def floors() -> list[list[str]]:
    """Return the packages of each line of the import contract, the topmost first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (c for c in settings["contracts"] if c["type"] == "layers")
    return [[name.strip() for name in line.split("|")] for line in contract["layers"]]


def sentence(package: str) -> str:
    """Return the first sentence of a package's or module's docstring."""
    folder = ROOT / "subspace" / package
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split())
    return text.partition(". ")[0].rstrip(".")


def wrapped(text: str, width: int) -> list[str]:
    """Return the text in at most two lines of so many characters."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    if len(lines) > 2:
        lines = [lines[0], lines[1][: width - 2].rstrip(" ,;:") + " …"]
    return lines


def draw() -> str:
    """Return the picture."""
    rows = floors()
    height = HEAD + len(rows) * (FLOOR + GAP) + MARGIN
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="packages">',
        f"<style>{STYLE}</style>",
        f'<text x="{MARGIN}" y="26" class="name">subspace: each floor imports only from the floors below it</text>',
        f'<text x="{MARGIN}" y="46" class="note">drawn from the import contract in pyproject.toml; '
        "neighbours on a floor do not know each other</text>",
    ]
    for floor, names in enumerate(rows):
        y = HEAD + floor * (FLOOR + GAP)
        wide = (WIDTH - 2 * MARGIN - (len(names) - 1) * GAP) / len(names)
        for column, name in enumerate(names):
            x = MARGIN + column * (wide + GAP)
            title = f"{name}/" if (ROOT / "subspace" / name).is_dir() else f"{name}.py"
            out.append(f'<rect x="{x:g}" y="{y}" width="{wide:g}" height="{FLOOR}" rx="6"/>')
            out.append(f'<text x="{x + 10:g}" y="{y + 19}" class="name">{title}</text>')
            for line, text in enumerate(wrapped(sentence(name), int((wide - 20) / 6.1))):
                out.append(f'<text x="{x + 10:g}" y="{y + 36 + 15 * line}" class="note">{escape(text)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
