"""Write and read models with transformers 4, in an environment of its own, for oracles/test_older_transformers.py.

It imports nothing of this project, whose version of transformers is another one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

assert transformers.__version__.startswith("4."), transformers.__version__


def write(job: dict[str, Any]) -> None:
    """Write a random model and a tokenizer into a folder, as version 4 does."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(job["architecture"], **job["sizes"])
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1 if "norm" in name else 0.3)
        elif "experts" in name and not parameter.any():
            parameter.data.normal_(std=0.15)
    model.save_pretrained(job["folder"])
    if job.get("sentencepiece"):
        tokenizer: Any = LlamaTokenizer(job["sentencepiece"], legacy=False)
    else:
        files, fast = {"tokenizer_file": job["tokenizer"]}, PreTrainedTokenizerFast
        tokenizer = fast(**files, **job["special"])  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(job["folder"])


def read(job: dict[str, Any]) -> dict[str, Any]:
    """Return the logits that a folder's model gives, and the ids that its tokenizer gives."""
    model: Any = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32, attn_implementation="eager")
    tokenizer: Any = AutoTokenizer.from_pretrained(job["folder"])
    with torch.no_grad():
        logits = model(torch.tensor(job["ids"]), use_cache=False).logits
    return {"logits": logits, "texts": [tokenizer(text).input_ids for text in job["texts"]]}


def main(folder: Path) -> None:
    """Do what ``jobs.json`` says, and write ``found.json`` and ``found.safetensors``."""
    texts, logits = {}, {}
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        if job["do"] == "write":
            write(job)
        else:
            try:
                found = read(job)
            except Exception as error:  # one model's, for its own test
                texts[name] = f"{type(error).__name__}: {error}"
                continue
            texts[name], logits[name] = found["texts"], found["logits"].contiguous()
    (folder / "found.json").write_text(json.dumps(texts))
    save_file(logits, folder / "found.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
