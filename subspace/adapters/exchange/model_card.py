"""The model card of a merged folder, ``README.md``: what it was made of and how, without traces of this machine.

The base's own card lies beside it, byte for byte, as ``BASE_README.md``; its licence is taken over into the header that
the hub reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subspace import __version__
from subspace.adapters.exchange.base_files import BASE_CARD, CARD, RECORD
from subspace.adapters.serialization import TENSORS, read_description
from subspace.common.files import file_sha256
from subspace.models.files import ModelFiles

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
#: Lines of the header of a model card that are taken over; the values are on the hub's lists, or names and links.
LICENSE = re.compile(
    r"^(license|license_name|license_link):[ \t]*(['\"]?[\w.+:/-][\w.+:/ -]*['\"]?)[ \t]*$", re.MULTILINE
)
MOST_HEADER = 100_000  # characters of a card that are searched


def base_name(path: str, files: ModelFiles) -> str:
    """Return what a base is called elsewhere: its name on the hub, or the last part of a path of this machine."""
    if not Path(path).expanduser().exists():
        return path
    folder = files.folder.resolve()
    if folder.parent.name == "snapshots" and (cached := re.fullmatch("models--(.+?)--(.+)", folder.parent.parent.name)):
        return "/".join(cached.groups())
    return files.gguf or folder.name


def adapter_facts(folder: Path) -> dict[str, Any]:
    """Return what an adapter is, for the record of what was made with it: names, checksum, methods and settings."""
    groups = read_description(folder)["adapters"]
    return {
        "adapter": "/".join(folder.resolve().parts[-2:]),
        "adapter_sha256": file_sha256(folder / TENSORS),
        "methods": [
            {"method": group["method"], "settings": group["settings"], "sites": len(group["sites"])} for group in groups
        ],
    }


def model_card(name: str, about: Mapping[str, Any], base_folder: Path) -> str:
    """Return the card of a merged folder.

    Args:
        name: the folder's.
        about: what ``merge.json`` holds.
        base_folder: the base's.
    """
    theirs = base_folder / CARD
    base, record = about["base"], about["base_record"]
    header = [*_license(theirs), "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- subspace"]
    if HUB_ID.fullmatch(base):
        header = [f"base_model: {base}", *header]
    commit = f" at commit `{record['commit']}`" if record["commit"] else ""
    part = "" if about["scale"] == 1 else f" at {about['scale']:g} of what was trained"
    lines = [
        "---", *header, "---", "", f"# {name}", "",
        f"`{base}`{commit} with trained adapters merged into its weights, by `subspace merge`, version "
        f"{__version__}. An ordinary model: nothing of the adapters' library is needed to load it.", "",
        *_methods(about["methods"]), "",
        f"- Base: SHA-256 of its weights `{record['weights']}`",
        f"- Adapter: `{about['adapter']}`, SHA-256 `{about['adapter_sha256']}`",
        f"- Layers merged: {about['layers']}{part}, in float32, then rounded to {about['dtype']}. The update is "
        f"{about['update']:.2e} of the weights' norm; rounding takes {about['rounding']:.1%} of it",
        f"- Largest difference of a logit from the unmerged model, relative to the largest logit, before this folder "
        f"was put in place: {about['merged_difference']:.1e} merged, {about['written_difference']:.1e} as written "
        f"({about['same_tokens']:.1%} of next tokens equal). The tokenizer gives the base's ids",
        "- Tokenizer, templates and other files are the base's; so is `config.json`, but for what merging changes",
        f"- The same for programs, with the base's configuration: `{RECORD}`",
    ]  # fmt: skip
    if theirs.is_file():
        lines += ["", f"The base's own card, with its terms of use, is [{BASE_CARD}]({BASE_CARD})."]
    return "\n".join(lines) + "\n"


def _methods(methods: list[Mapping[str, Any]]) -> list[str]:
    settings = [", ".join(f"{key} {value}" for key, value in each["settings"].items()) for each in methods]
    rows = [f"| {m['method']} | {m['sites']} | {said} |" for m, said in zip(methods, settings, strict=True)]
    return ["| method | sites | settings |", "| :--- | ---: | :--- |", *rows]


def _license(card: Path) -> list[str]:
    """Return the lines of a card's header that name its licence; none if it has no card or no such lines."""
    try:
        text = card.read_text(encoding="utf-8", errors="replace")[:MOST_HEADER]
    except OSError:
        return []
    found = re.match(r"---\s*\n(.*?\n)---\s*\n", text, re.DOTALL)
    return [f"{key}: {value}" for key, value in LICENSE.findall(found.group(1))] if found else []
