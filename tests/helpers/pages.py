"""What a page of results must be: well formed, read by everyone, and in need of nothing outside."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Parsed(HTMLParser):
    """A page's elements in order, as ``(tag, attributes, the tags around it)``, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], tuple[str, ...]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), (tag, names)
        self.elements.append((tag, {name: value or "" for name, value in attrs}, tuple(self._open)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, tag
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        """Return the attributes of all elements of a tag."""
        return [attributes for name, attributes, _ in self.elements if name == tag]


def check_page(page: str) -> Parsed:
    """Raise AssertionError for a page that is malformed, reaches outside, or that some could not read; return it."""
    found = Parsed(page)
    tags = [tag for tag, _, _ in found.elements]
    assert set(tags) <= KNOWN, set(tags) - KNOWN
    for tag, attributes, _ in found.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "action", "srcset", "style"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = [a["content"] for a in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert found.all("html")[0]["lang"] == "en"
    ids = [attributes["id"] for _, attributes, _ in found.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _, attributes, _ in found.elements:
        assert set(attributes.get("aria-labelledby", "").split()) <= set(ids)
    assert {a["href"].removeprefix("#") for a in found.all("a")} <= set(ids)
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(attributes.get("scope") in ("row", "col") for attributes in found.all("th"))
    for attributes in found.all("svg"):
        assert attributes.get("aria-hidden") == "true" or (attributes["role"], attributes["aria-labelledby"]) > (
            "img",
            "",
        )
    assert all(attributes["tabindex"] == "0" for attributes in found.all("figure"))
    assert tags.count("table") == sum(a.get("class") == "scroll" and a["tabindex"] == "0" for a in found.all("div"))
    return found


KNOWN = {
    "html", "head", "meta", "title", "style", "body", "a", "header", "h1", "h2", "h3", "p", "dl", "div", "dt", "dd",
    "bdi", "nav", "ul", "li", "main", "section", "figure", "figcaption", "svg", "desc", "polyline", "rect", "path",
    "circle", "text", "details", "summary", "table", "caption", "thead", "tbody", "tr", "th", "td",
}  # fmt: skip


def marks(page: str) -> dict[str, list[int]]:
    """Return how many marks each drawing has, by the id of its panel's heading."""
    found: dict[str, list[int]] = {}
    for drawing in re.findall(r'<svg role="img" aria-labelledby="(\S+?)-\d+-title.*?</svg>', page, re.DOTALL):
        found[drawing] = []
    for match in re.finditer(r'<svg role="img" aria-labelledby="(\S+?)-\d+-title.*?</svg>', page, re.DOTALL):
        found[match[1]].append(match[0].count("data-mark="))
    return found


#: Returns what is wrong with a page as it is shown: texts that meet or leave their drawing, what is off the page.
MEASURE = """(() => {
  const wrong = [], shown = e => e.getClientRects().length > 0, by = 0.5;
  const leaves = (a, b) => a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
  const before = (a, b) => a.left < b.right - by && a.top < b.bottom - by;
  const meets = (a, b) => before(a, b) && before(b, a);
  for (const svg of document.querySelectorAll("svg[role=img]")) {
    if (!shown(svg)) continue;
    const frame = svg.getBoundingClientRect(), name = svg.querySelector("title").textContent;
    const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([text, box], i) => {
      if (leaves(box, frame)) wrong.push(`${name}: '${text}' leaves its drawing`);
      for (const [other, b] of texts.slice(0, i)) if (meets(box, b)) wrong.push(`${name}: '${text}' meets '${other}'`);
    });
    for (const mark of svg.querySelectorAll("[data-mark]")) {
      const box = mark.getBoundingClientRect();
      if (box.width < 1 || box.height < 1) wrong.push(`${name}: a mark is not seen`);
      if (leaves(box, frame)) wrong.push(`${name}: a mark leaves its drawing`);
    }
  }
  for (const one of document.querySelectorAll(".drawing"))
    if ([...one.children].filter(shown).length !== 1) wrong.push("a chart is shown in several widths, or in none");
  const wide = document.documentElement.clientWidth, needed = document.documentElement.scrollWidth;
  if (needed > wide) wrong.push(`the page is ${needed} wide, not ${wide}`);
  for (const e of document.querySelectorAll("h1, h2, h3, p, li, dd, figcaption, figure, svg[role=img], summary")) {
    const box = e.getBoundingClientRect();
    if (shown(e) && !e.closest(".scroll") && (box.right > wide + 1 || box.left < -1))
      wrong.push(`${e.tagName} is off the page`);
  }
  return wrong;
})()"""

#: Returns how many marks each drawing that is shown has.
SHOWN_MARKS = """Object.fromEntries(
  [...document.querySelectorAll("svg[role=img]")].filter(e => e.getClientRects().length)
  .map(e => [e.getAttribute("aria-labelledby"), e.querySelectorAll("[data-mark]").length]))"""
