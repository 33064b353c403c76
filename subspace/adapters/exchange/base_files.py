"""The files of a merged model besides its weights: the base's, byte for byte, and a configuration with its keys.

A library that writes them anew writes them for its own version and with traces of the machine. What merging changes in
the configuration is changed there, and nothing else. A folder that transformers 5 wrote itself is made readable for
version 4 (:mod:`subspace.adapters.exchange.older_readers`), which is what many servers have.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from subspace.adapters.exchange.older_readers import readable_config, readable_tokenizer_config
from subspace.common.files import MANIFEST, PARTIAL
from subspace.errors import UserError
from subspace.models.files import ModelFiles, read_json

logger = logging.getLogger("subspace")

CARD, BASE_CARD, RECORD = "README.md", "BASE_README.md", "merge.json"
CONFIG, TOKENIZER_CONFIG, GENERATION = "config.json", "tokenizer_config.json", "generation_config.json"
TEMPLATES = "additional_chat_templates"
#: Endings of files that hold tensors, of this library or others.
TENSORS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".npz",
     ".npy", ".pkl", ".pickle", ".tflite", ".mlmodel", ".mlpackage", ".nemo", ".distcp", ".arrow", ".parquet"}
)  # fmt: skip
#: What describes weights that are not these any more.
STALE = frozenset(
    {CONFIG, MANIFEST, RECORD, "quantize_config.json", "quant_config.json", "hf_quant_config.json", "params.json",
     "adapter.json", "adapter_config.json", "trainer_state.json"}
)  # fmt: skip
QUANTIZED = ("quantization_config", "compression_config")
DTYPES = ("torch_dtype", "dtype")
MERGING_CHANGES = ("tie_word_embeddings", "attention_bias", "mlp_bias")


def copy_base_files(files: ModelFiles, folder: Path) -> None:
    """Copy a base's files besides its weights into a folder that transformers has written, over what it wrote.

    The tokenizer's files are the base's, or, of a GGUF file, transformers'.
    """
    if files.gguf is None:
        (folder / GENERATION).unlink(missing_ok=True)  # made from the configuration where the base has none
        for file in base_files(files):
            target = folder / file.relative_to(files.folder)
            target = target.with_name(BASE_CARD) if target == folder / CARD else target
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    settings = read_json(folder / TOKENIZER_CONFIG)
    readable = readable_tokenizer_config(settings, whole=(folder / "tokenizer.json").is_file())
    if readable != settings:
        _write(folder / TOKENIZER_CONFIG, readable)


def base_files(files: ModelFiles) -> Iterator[Path]:
    """Yield the files of a model's folder that go with its weights into another: not tensors, nor what is hidden.

    Of subfolders that of further templates: others are models of their own, logs, or whatever else a user keeps there.
    A link is followed to where the configuration or a weight file lies, as in the hub's cache. One to anywhere else
    would carry a file of this machine into a folder that is made to be given away.

    Raises:
        UserError: a file of the tokenizer is such a link.
    """
    folder, own = files.folder, files.folder.resolve()
    places = {file.resolve().parent for file in (folder / CONFIG, *files.weight_files())}
    for path in (*sorted(folder.iterdir()), *sorted(folder.glob(f"{TEMPLATES}/*.jinja"))):
        stale = path.name in STALE or path.name.endswith((PARTIAL, ".index.json")) or path.suffix.lower() in TENSORS
        if stale or not path.is_file() or path.name.startswith((".", "__")):
            continue
        target = path.resolve()
        if target.is_relative_to(own) or target.parent in places:
            yield path
            continue
        if path in files.tokenizer_files():
            raise UserError(
                f"the merged model was not written: {path} is a link to {target}, away from the model's files, and is "
                "not copied. Copy that file into the base's folder"
            )
        logger.warning("note: %s is a link to %s, away from the model's files, and is not copied", path, target)


def write_config(files: ModelFiles, folder: Path, model: Any, before: Mapping[str, Any], dtype: str) -> None:
    """Write the merged model's ``config.json``: the base's keys and values, but for what merging changes.

    Args:
        files: the base's.
        folder: where transformers has written its own form of it.
        model: the merged one.
        before: the base's configuration as it was when it was opened, ``model.config.to_dict()``.
        dtype: of the written weights.
    """
    theirs, written = files.settings(), read_json(folder / CONFIG)
    if theirs.get("model_type") != model.config.model_type:  # the text decoder of a model that sees as well
        text = theirs.get("text_config")
        inside = isinstance(text, dict) and text.get("model_type") == model.config.model_type
        theirs = {**text} if inside else written  # type: ignore[dict-item]
    merged = _plain(theirs, dtype)
    if not any(key in merged for key in DTYPES):
        merged["torch_dtype"] = dtype  # which both versions read
    now = model.config.to_dict()
    merged |= {key: now[key] for key in MERGING_CHANGES if key in now and now[key] != before.get(key)}
    merged["architectures"] = written.get("architectures", [type(model).__name__])
    merged.pop("_name_or_path", None)
    merged = readable_config(merged)
    if merged == files.settings():
        shutil.copyfile(files.folder / CONFIG, folder / CONFIG)
    else:
        _write(folder / CONFIG, merged)


def _plain(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a configuration, and its parts', whose weights are not quantised and of a dtype."""
    return {
        key: dtype if key in DTYPES else _plain(value, dtype) if _is_part(key, value) else value
        for key, value in config.items()
        if key not in QUANTIZED
    }


def _is_part(key: str, value: Any) -> bool:
    return key.endswith("_config") and isinstance(value, dict)


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


#: What the tokenizers of a base and of a merged folder are compared by, beside the texts that logits are compared on.
TEXTS = (
    "",
    " leading, double  and trailing spaces \n\n\tand\ttabs ",
    "def f(x):\n    return x ** 2  # 3.14159, 1,000,000 and 2024-02-29",
    "Größe, naïve, 東京, Ελλάδα, العربية, हिन्दी, 👩‍👩‍👧 and \u200b",
    "<s>[INST] <|im_start|>user\nWhat is it?<|im_end|> [/INST] </s><|eot_id|><unk><pad>",
)


def check_tokenizer(base: Any, merged: Any, texts: tuple[str, ...], out: Path) -> None:
    """Raise UserError unless two tokenizers give the same ids to texts, and have the same special tokens and template.

    Args:
        base: the base's tokenizer.
        merged: the one that was opened from the written folder.
        texts: more to compare by.
        out: what is to be written, for the message.
    """
    own = [token for token in (base.bos_token, base.eos_token, base.unk_token, base.pad_token) if token]
    for text in (*texts, *TEXTS, f"a{' b'.join(own)}c"):
        for special in (True, False):
            found, expected = (each(text, add_special_tokens=special).input_ids for each in (merged, base))
            if found != expected:
                _refuse(out, f"its tokenizer reads {text!r} as {found}, the base's as {expected}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template"):
        if getattr(merged, name) != getattr(base, name):
            found, expected = getattr(merged, name), getattr(base, name)
            _refuse(out, f"its tokenizer's {name} is {found!r}, the base's is {expected!r}")
    if len(merged) != len(base):
        _refuse(out, f"its tokenizer has {len(merged)} tokens, the base's has {len(base)}")


def _refuse(out: Path, difference: str) -> None:
    shown = difference if len(difference) < 400 else f"{difference[:400]} ..."
    raise UserError(
        f"the merged model was not written to {out}: {shown}. Does the base's folder hold all files of its tokenizer?"
    )
