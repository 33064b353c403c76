"""Tables of an inspection, by kind of layer or by site, and what they say in words."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from subspace.common.tables import Grid
from subspace.diagnostics.inspect import Inspected, Inspection, kind_of
from subspace.diagnostics.subspaces import COMPARED, LOOKED_AT, Site

NONE = "-"
HEAD = (
    "layers", "sites", "‖ΔW‖/‖W‖", "rank", "diagonal", "in span", "by scaling", "top", "bottom", "task, smallest 10 %",
    "amplified", "intruders", "spectrum",
)  # fmt: skip
LEGEND = (
    "mean over sites, (by chance): for updates of the same singular values in random directions",
    "rank: exp of the entropy of ΔW's singular values, of as many directions as it has",
    "diagonal: share of ΔW that changes W's singular values alone; in span: within the spans of its singular vectors; "
    "by scaling: what scaling W's rows and columns could give",
    f"top, bottom: overlap of ΔW's first {COMPARED} directions with W's largest and smallest",
    f"task: of the {COMPARED} directions of W that change most for their size, those among its smallest tenth",
    "amplified: ‖ΔW‖ over what W does in ΔW's directions (median); spectrum: change of W's ten largest singular values",
    f"intruders: of the first {LOOKED_AT} singular vectors of W + ΔW, those that none of W's is near",
)


def grids(inspection: Inspection, *, layers: bool = False) -> list[Grid]:
    """Return a table of each adapter, and one of the pairs of runs; ``layers`` has a row for each site."""
    tables = [_grid(found, layers=layers) for found in inspection.found if found.sites]
    tables[-1] = replace(tables[-1], notes=(*tables[-1].notes, *LEGEND))
    over = [found for found in inspection.found if found.settled]
    if over:
        tables.append(_settling(over))
    if inspection.pairs:
        tables.append(_pairs(inspection))
    return tables


def _grid(found: Inspected, *, layers: bool) -> Grid:
    groups: dict[str, list[Site]] = {}
    for name, site in found.sites.items():
        groups.setdefault(name if layers else kind_of(name), []).append(site)
    rows = [_row(name, sites) for name, sites in groups.items()]
    if len(rows) > 1:
        rows.append(_row("all", list(found.sites.values())))
    left = [
        f"{count} sites of {name} are left out: no linear layer's weight is updated"
        for name, count in found.left_out.items()
    ]
    return Grid(found.label, HEAD, tuple(rows), (*findings(found), *left), last=int(len(rows) > 1))


def _row(name: str, sites: Sequence[Site]) -> tuple[str, ...]:
    moved = [site for site in sites if site.directions]
    if not moved:
        return (name, f"{len(sites)}", "0", *[NONE] * (len(HEAD) - 3))

    def mean(read: Callable[[Site], float | None]) -> float | None:
        return _mean(read(site) for site in moved)

    return (
        name,
        f"{len(sites)}",
        _said(mean(lambda s: s.relative), ".1e"),
        f"{_said(mean(lambda s: s.entropy_rank), '.1f')} of {max(s.directions for s in moved)}",
        _beside(mean(lambda s: s.diagonal), mean(lambda s: s.diagonal_chance), ".4f"),
        _said(mean(lambda s: s.span), ".2f"),
        _said(mean(lambda s: s.scale), ".3f"),
        _beside(mean(_top), mean(_chance), ".3f"),
        _beside(mean(_bottom), mean(_chance), ".3f"),
        _beside(mean(lambda s: s.smallest_decile), mean(lambda s: s.smallest_chance), ".2f"),
        _beside(_median(s.amplification for s in moved), _median(s.amplification_chance for s in moved), ".3g"),
        f"{sum(site.intruders for site in moved)}",
        _said(mean(lambda s: s.spectrum_change), ".1e"),
    )


def _top(site: Site) -> float | None:
    return _mean([site.top_out, site.top_in])


def _bottom(site: Site) -> float | None:
    return _mean([site.bottom_out, site.bottom_in])


def _chance(site: Site) -> float | None:
    return _mean([site.out_chance, site.in_chance])


def findings(found: Inspected) -> list[str]:
    """Return what an adapter's numbers say, in sentences."""
    moved = [site for site in found.sites.values() if site.directions]
    if not moved:
        return ["ΔW is zero at every site: nothing was trained, or the training has not begun"]
    said = []
    if still := len(found.sites) - len(moved):
        said.append(f"ΔW is zero at {still} of {len(found.sites)} sites")
    q, used = max(s.directions for s in moved), statistics.median(s.entropy_rank for s in moved)
    enough = max(s.rank_90 for s in moved)
    if enough < q:
        said.append(f"rank {used:.1f} of {q} used (median): {enough} directions hold 90 % of ΔW at every site")
    for word, read in (("largest", _top), ("smallest", _bottom)):
        value, chance = _mean(map(read, moved)), _mean(map(_chance, moved))
        if value is not None and chance and value > 2 * chance:
            said.append(f"ΔW leans on W's {word} directions: {value / chance:.1f} times as much as by chance")
    diagonal, chance = _mean(s.diagonal for s in moved), _mean(s.diagonal_chance for s in moved)
    if diagonal is not None and chance and diagonal > 2 * chance:
        said.append(f"it changes W's own singular values {diagonal / chance:.1f} times as much as by chance")
    intruders = sum(site.intruders for site in moved)
    said.append(
        f"{intruders} intruder dimensions at {sum(site.intruders > 0 for site in moved)} of {len(moved)} sites, which "
        "go with forgetting: see what was kept (evaluate.retention=passages)"
        if intruders
        else "no intruder dimensions"
    )
    return said


def _settling(found: Sequence[Inspected]) -> Grid:
    rows = []
    for each in found:
        spaces, tasks = zip(*each.settled.values(), strict=True)
        rows.append(
            (
                each.label,
                _said(_mean(spaces), ".2f"),
                _beside(_mean(tasks), _mean(s.task_chance for s in each.sites.values()), ".2f"),
                _said(_mean(s.relative for s in each.sites.values()), ".1e"),
            )
        )
    head = ("step", "subspace", "task directions", "‖ΔW‖/‖W‖")
    return Grid("over steps", head, tuple(rows), (
        f"subspace: overlap of ΔW's first {COMPARED} directions with those at the end; task directions: the share of "
        "those at the end that are chosen already (that random updates choose: small directions change easily)",
    ))  # fmt: skip


def _pairs(inspection: Inspection) -> Grid:
    rows = []
    sizes = [_chance(site) for found in inspection.found for site in found.sites.values() if site.directions]
    for (one, other), overlap in inspection.pairs.items():
        rows.append((one, other, _beside(_mean(overlap.values()), _mean(sizes), ".3f"), f"{len(overlap)}"))
    note = f"overlap of the first {COMPARED} directions of two updates, from 0 to 1 (by chance)"
    return Grid("between runs", ("run", "run", "overlap", "sites"), tuple(rows), (note,), left=2)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _said(value: Any, form: str) -> str:
    return NONE if value is None else format(value, form)


def _beside(value: float | None, chance: float | None, form: str) -> str:
    return _said(value, form) + (f" ({_said(chance, form)})" if value is not None and chance is not None else "")
