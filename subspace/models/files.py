"""A model's files on this machine: checks that they are complete and of a supported kind.

Also two context managers for calls that read them: one converts errors to UserErrors, the other silences logs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from subspace.common.download import refuse_lfs_pointer
from subspace.common.foreign.text import read_bytes
from subspace.errors import UserError, shown
from subspace.models.transformers_compat import is_causal_lm, is_masked_lm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "spiece.model")
#: Other files that a tokenizer may be read from.
TOKENIZER_PARTS = ("merges.txt", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")
MOST_HEADER = 100_000_000  # bytes of a safetensors file's description, by its format
#: Bytes of a tokenizer, or of an index of weights.
MOST_FILE = 1 << 28
WORKING = "LLaMA, Mistral, Qwen2, Qwen3, Gemma and Phi-3 checkpoints work"

NOT_A_MODEL = {
    "adapter.json": "it holds an adapter. Give the model that it was trained on",
    # transformers would silently load this adapter's base, and the adapter into it
    "adapter_config.json": "it holds an adapter of HF PEFT. Make a run of it: subspace import FOLDER",
    "config.yaml": "it is the folder of a run. Its config.yaml names the model",
}

# Keywords of transformers' error messages about unreadable files, and advice. The empty keyword always matches.
ADVICE = {
    "flash": "`attention: sdpa` and `attention: eager` need no such package",
    "scaled_dot_product_attention": "`attention: eager` works",
    "bitsandbytes": "`pip install bitsandbytes accelerate`, or use `quantize: none`",
    "trust_remote_code": "`model.trust_remote_code=true` on the command line runs it, if you trust its author",
    "deserializ": "A weight file is cut or damaged: download the folder again",
    "model type": WORKING,
    "": "Is the folder complete?",
}


@dataclass(frozen=True)
class ModelFiles:
    """A model's files: their folder, and the file's name for a GGUF model."""

    name: str
    folder: Path
    gguf: str | None = None

    @classmethod
    def at(cls, name: str, path: Path) -> Self:
        """Return the model files at a folder or GGUF file; raise UserError for anything else."""
        if path.suffix == ".gguf" and path.is_file():
            return cls(name, path.parent, path.name)
        for file, what in NOT_A_MODEL.items():
            if (path / file).is_file():
                raise UserError(f"cannot open model {name!r}: {what}")
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        if (path / "config.json").is_file():
            return cls(name, path)
        if len(ggufs) == 1:
            return cls(name, path, ggufs[0])
        found = f"has several GGUF files; name one of {', '.join(ggufs)}" if ggufs else "has no config.json"
        raise UserError(
            f"cannot open model {name!r}: {path} {found}. What works: a folder with config.json, *.safetensors and a "
            "tokenizer; one GGUF file; a name that `subspace prepare` brought here"
        )

    def architecture(self, *, trust_remote_code: bool) -> PreTrainedConfig:
        """Return the architecture's configuration; raise UserError if it is not a decoder."""
        from transformers import AutoConfig

        self._check_pointers([self.folder / (self.gguf or "config.json")])
        with (
            as_user_error(f"cannot read the configuration of model {self.name!r} in {self.folder}"),
            suppress_library_logs(),
        ):
            described: PreTrainedConfig = AutoConfig.from_pretrained(
                self.folder, gguf_file=self.gguf, trust_remote_code=trust_remote_code, local_files_only=True
            )
        kind = described.model_type
        decodes = is_causal_lm(kind) or trust_remote_code
        # BERT-like models can be loaded as decoders, but were trained with bidirectional attention.
        encodes = is_masked_lm(kind) and not getattr(described, "is_decoder", False)
        if described.is_encoder_decoder or encodes or not decodes:
            what = "an encoder-decoder" if described.is_encoder_decoder else "an encoder" if encodes else "no decoder"
            raise UserError(
                f"model {self.name!r} is {what} ({kind}), and this project adapts decoder language models. {WORKING}"
            )
        return described

    @property
    def commit(self) -> str | None:
        """The hub's commit that the files are of; None for other folders."""
        inside = self.folder.absolute()
        return inside.name if inside.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", inside.name) else None

    def settings(self) -> dict[str, Any]:
        """Return what stands in ``config.json``; nothing if it cannot be read, which :meth:`architecture` reports."""
        return {} if self.gguf else read_json(self.folder / "config.json")

    def weight_files(self) -> list[Path]:
        """Return the files that the weights are read from, and no others in the folder; empty if there are none."""
        if self.gguf:
            return [self.folder / self.gguf]
        present = [self.folder / name for name in WEIGHTS if (self.folder / name).is_file()]
        if not present or not present[0].name.endswith(".index.json"):
            return present[:1]
        self._check_pointers(present[:1])
        with as_user_error(f"cannot read {present[0]}"):
            index = json.loads(read_bytes(present[0], most=MOST_FILE).decode())
            names = sorted(set(index["weight_map"].values()))
            if outside := [name for name in names if Path(name).name != name]:
                raise UserError(f"{present[0]} names {shown(outside[0])}, which is no file of the model's folder")
            return [self.folder / name for name in names]

    def check_weights(self) -> None:
        """Raise UserError if weight files are missing, cut, or not what their names say."""
        files = self.weight_files()
        if not files:
            raise UserError(
                f"model {self.name!r} has no weights: none of {', '.join(WEIGHTS)} is in {self.folder}. "
                "Download the folder again"
            )
        if absent := [file.name for file in files if not file.is_file()]:
            raise UserError(
                f"model {self.name!r} lacks {len(absent)} of the {len(files)} weight files in its index, "
                f"e.g. {absent[0]}, in {self.folder}. Download the folder again"
            )
        self._check_pointers(files)
        self.headers()

    def headers(self) -> dict[str, StoredTensor]:
        """Return what the safetensors files say of their tensors, by name; nothing of files in another format."""
        found: dict[str, StoredTensor] = {}
        for file in self.weight_files():
            if file.suffix == ".safetensors":
                try:
                    found |= read_header(file)
                except ValueError as error:
                    raise UserError(
                        f"cannot open model {self.name!r}: {file.name} in {self.folder} is cut or damaged: {error}. To "
                        "mend it, download the folder again, or only that file"
                    ) from None
        return found

    def tokenizer_files(self) -> list[Path]:
        """Return the files that are there of those that a tokenizer is read from."""
        listed = [self.folder / name for name in (*TOKENIZERS, *TOKENIZER_PARTS)]
        return [file for file in (*listed, *sorted(self.folder.glob("*.tiktoken"))) if file.is_file()]

    def check_tokenizer(self) -> None:
        """Raise UserError if there are no tokenizer files."""
        if self.gguf:
            return
        self._check_pointers(self.tokenizer_files())
        if not any((self.folder / name).is_file() for name in TOKENIZERS):
            raise UserError(
                f"model {self.name!r} has no tokenizer: none of {', '.join(TOKENIZERS)} is in {self.folder}. "
                "Copy the files of the original model's tokenizer there"
            )

    def _check_pointers(self, files: list[Path]) -> None:
        for file in files:
            refuse_lfs_pointer(file, f"cannot open model {self.name!r}: ")


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON file's mapping; an empty one if the file is missing or damaged, which its own reader reports."""
    try:
        content = json.loads(read_bytes(file, most=MOST_FILE).decode())
    except (UserError, OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file: its dtype as the format names it, its shape, and its first and last byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, without reading them.

    Raises:
        ValueError: it is no such file, or not as long as its own description says.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(8)
        length = int.from_bytes(head, "little")
        if size < 8 or length > MOST_HEADER:
            raise ValueError(f"it begins with {head!r}, which no safetensors file does")
        described = opened.read(length)
    if len(described) < length:
        raise ValueError(f"it has {size:,} bytes, fewer than the description of its tensors")
    try:
        content = json.loads(described)
        content.pop("__metadata__", None)
        found = {
            name: StoredTensor(each["dtype"], tuple(each["shape"]), *(8 + length + at for at in each["data_offsets"]))
            for name, each in content.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("the description of its tensors cannot be read") from None
    expected = max((tensor.end for tensor in found.values()), default=8 + length)
    if expected != size:
        raise ValueError(f"it has {size:,} bytes where its tensors take {expected:,}")
    return found


@contextlib.contextmanager
def as_user_error(request: str) -> Iterator[None]:
    """Convert exceptions that transformers and its dependencies raise for a user's files into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        advice = next(advice for key, advice in ADVICE.items() if key in text.lower())
        first_sentence = re.split(r"(?<=\.)\s|\n", text)[0].rstrip(".")
        raise UserError(f"{request}: {first_sentence}. {advice}") from error


@contextlib.contextmanager
def suppress_library_logs() -> Iterator[None]:
    """Silence progress bars and warnings of transformers and bitsandbytes; exceptions are unaffected."""
    from transformers.utils import logging as messages

    from subspace.distributed.device import on_gpu

    if not on_gpu():  # otherwise DeepSpeed, imported when a model is saved, logs its choice of device
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    messages.set_verbosity(logging.ERROR)
    messages.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()  # type: ignore[no-untyped-call]
