"""Chat templates in the styles of the usual families, and a tokenizer that has their control tokens.

``templates()`` has them all, from the ``.jinja`` files beside this module. With ``SUBSPACE_CHAT_TEMPLATES`` set to a
folder, the ``.jinja`` files below it, such as those of the public repositories of templates, are tried too.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tests.helpers.tiny_models import bpe_tokenizer

FOLDER = "SUBSPACE_CHAT_TEMPLATES"
OWN = Path(__file__).parent / "chat_templates"

CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<|end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<｜User｜>", "<｜Assistant｜>"),
    *("<｜end▁of▁sentence｜>", "<|observation|>"),
)
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")  # not special


def templates() -> dict[str, str]:
    """Return every template at hand by its name."""
    found = {file.stem: file.read_text(encoding="utf-8") for file in sorted(OWN.glob("*.jinja"))}
    if folder := os.environ.get(FOLDER):
        for file in sorted(Path(folder).rglob("*.jinja")):
            text = file.read_text(encoding="utf-8")
            if file.parent.name == "chat_templates" and text.startswith("{% if messages[0]['role'] == 'system'"):
                # As its authors say in their README, a file of chujiezheng/chat_templates is laid out to be read.
                text = text.replace("    ", "").replace("\n", "")
            found[f"{file.parent.name}/{file.stem}"] = text
    return found


@cache
def chat_tokenizer(template: str | None = None) -> PreTrainedTokenizerBase:
    """Return a byte-level tokenizer with the control tokens of the families, and this chat template."""
    special = {"chat_template": template} if template else {}
    tokenizer = bpe_tokenizer(pad_token="<|reserved_special_token_0|>", **special)
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL)})
    tokenizer.add_tokens(list(ADDED))
    return tokenizer
