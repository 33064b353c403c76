"""The check's outcomes as a page of Markdown: what failed, then every figure. Nothing but the standard library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.gpu.items import ITEMS, STEPS

Json = dict[str, Any]
MARKS = {"passed": "passed", "failed": "**FAILED**", "left out": "left out"}


def write_report(found: Json, file: Path) -> None:
    """Write the page."""
    file.write_text("\n".join([*_summary(found), *_failures(found), *_figures(found)]) + "\n")


def _summary(found: Json) -> list[str]:
    where = f"on {found['device']}" + (", tiny shapes: the figures say nothing" if found["tiny"] else "")
    lines = ["# Check of a device", "", f"Written by `python tests/gpu/check.py`, {where}.", ""]
    lines.append("| step | item | what | passed | failed | left out | seconds |")
    lines.append("| ---: | --- | --- | ---: | ---: | ---: | ---: |")
    for item in ITEMS:
        outcome = found["items"].get(item.name)
        if outcome is None:
            lines.append(f"| {item.step} | {item.name} | {item.title} | not run | | | |")
            continue
        statuses = [case["status"] for case in outcome["cases"].values()]
        counts = " | ".join(str(statuses.count(kind)) for kind in MARKS)
        seconds = f"{outcome['seconds']:.0f}" + ("" if outcome["ended"] else ", did not end")
        lines.append(f"| {item.step} | {item.name} | {item.title} | {counts} | {seconds} |")
    return lines


def _failures(found: Json) -> list[str]:
    lines = ["", "## What failed or was left out", ""]
    told = len(lines)
    for name, outcome in found["items"].items():
        if not outcome["ended"]:
            lines.append(f"- **{name}** did not end: {_line(outcome.get('error', ''))}")
        for case, result in outcome["cases"].items():
            if result["status"] != "passed":
                lines.append(f"- {MARKS[result['status']]} {name}, {case}: {_line(result.get('error', ''))}")
    return lines if len(lines) > told else [*lines, "Nothing."]


def _figures(found: Json) -> list[str]:
    lines = []
    for step, title in STEPS.items():
        lines += ["", f"## {step}. {title}"]
        for item in ITEMS:
            cases = found["items"].get(item.name, {}).get("cases", {}) if item.step == step else {}
            if any(result.get("figures") for result in cases.values()):
                lines += ["", f"### {item.name}: {item.title}", "", *_table(cases)]
    return lines


def _table(cases: Json) -> list[str]:
    """Return a table of an item's cases with a column of each figure, and below it what is a list itself."""
    figures = {case: result.get("figures", {}) for case, result in cases.items()}
    lists = [
        (case, key, value) for case, own in figures.items() for key, value in own.items() if isinstance(value, list)
    ]
    listed = {key for _, key, _ in lists}
    columns = list(dict.fromkeys(key for own in figures.values() for key in own if key not in listed))
    lines = ["| " + " | ".join(["case", "", *columns]) + " |", "| --- | --- |" + " ---: |" * len(columns)]
    for case, own in figures.items():
        cells = [_value(own[column]) if column in own else "" for column in columns]
        lines.append("| " + " | ".join([case, MARKS[cases[case]["status"]], *cells]) + " |")
    for case, key, value in lists:
        if value:
            lines += ["", f"{case}, {key}:", "", *(f"- {_value(each)}" for each in value)]
    return lines


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(each)}" for key, each in value.items())
    return _line(str(value), 400)


def _line(text: str, most: int = 600) -> str:
    """Return a text as one line of a table."""
    flat = " ".join(text.split()).replace("|", "\\|")
    return flat if len(flat) <= most else "... " + flat[-most:]
