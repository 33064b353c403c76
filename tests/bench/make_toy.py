"""Make ``launch/studies/toy``: a model of 90,000 numbers that knows four games of letters; rows and items of a fifth.

``python -m tests.bench.make_toy`` (two minutes of a core). The model copies words of six letters, moves each letter on
by one in the alphabet, and finds the first and the last of them there. Studies teach it to roll words: ``abcdef`` to
``bcdefa``. So a study runs from a fresh clone in seconds, on something that was trained before it is adapted.
"""

from __future__ import annotations

import json
import random
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from subspace.common.paths import REPOSITORY
from tests.helpers.tiny_models import save

TOY = REPOSITORY / "launch" / "studies" / "toy"
LETTERS = string.ascii_lowercase[:16]
GAMES: dict[str, Callable[[str], str]] = {
    "copy": lambda word: word,
    "next": lambda word: "".join(LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in word),
    "least": min,
    "most": max,
    "roll": lambda word: word[1:] + word[:1],  # which studies train
}
ROWS, ITEMS, SIZE = 1200, 400, 6
STEPS, BATCH, PEAK = 2000, 128, 3e-3
BEGIN, END = "<s>", "</s>"


def words(count: int, seed: int) -> list[str]:
    """Return different words of different letters."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.sample(LETTERS, SIZE))] = None
    return list(found)


def texts(game: str, word: str) -> tuple[str, str]:
    """Return a game's question about a word, and the answer."""
    return f"{game} {word} =", f" {GAMES[game](word)}"


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte, and no others but the ends."""
    names = [BEGIN, END, "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bare = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    ends = {"bos_token": BEGIN, "eos_token": END, "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=bare, **ends)  # type: ignore[no-untyped-call]


def batch(encode: Any, draw: random.Random, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens, and labels of their answers, of rows of one of the four games."""
    game = list(GAMES)[number % 4]
    rows, labels = [], []
    for _ in range(BATCH):
        question, answer = texts(game, "".join(draw.sample(LETTERS, SIZE)))
        asked, told = encode(question), [*encode(answer)[1:], encode.__self__.eos_token_id]
        rows.append(asked + told)
        labels.append([-100] * len(asked) + told)
    return torch.tensor(rows), torch.tensor(labels)


def pretrained(made: PreTrainedTokenizerFast) -> Any:
    """Return a LLaMA of two layers that has learnt the four games."""
    config = AutoConfig.for_model(
        "llama", vocab_size=len(made), hidden_size=64, intermediate_size=128, num_hidden_layers=2, bos_token_id=0,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=STEPS, pct_start=0.05)
    draw = random.Random(0)
    for number in range(STEPS):
        tokens, labels = batch(made.encode, draw, number)
        logits = model(tokens).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if number % 400 < 4:
            print(number, list(GAMES)[number % 4], f"{float(loss.detach()):.3f}", flush=True)
    return model.eval()


def write_rows(folder: Path) -> None:
    """Write the rows and the items of the game that the model does not know, of different words."""
    found = words(ROWS + ITEMS, seed=1)
    with (folder / "rows.jsonl").open("w") as opened:
        for word in found[:ROWS]:
            question, answer = texts("roll", word)
            opened.write(json.dumps({"instruction": question, "output": answer}) + "\n")
    draw = random.Random(2)
    with (folder / "items.jsonl").open("w") as opened:
        for word in found[ROWS:]:
            right = GAMES["roll"](word)
            choices = [right]
            while len(choices) < 4:  # two neighbours changed, which is the hardest to tell
                at = draw.randrange(len(right) - 1)
                other = right[:at] + right[at + 1] + right[at] + right[at + 2 :]
                choices += [other] if other not in choices else []
            draw.shuffle(choices)
            item = {"question": texts("roll", word)[0], "choices": choices, "label": choices.index(right)}
            opened.write(json.dumps(item) + "\n")


def main() -> None:
    """Write the model, the rows and the items."""
    torch.set_num_threads(1)
    write_rows(TOY)
    made = tokenizer()
    model = pretrained(made).to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        save(model, made, Path(folder))
        (TOY / "model").mkdir(exist_ok=True)
        for file in Path(folder).iterdir():
            (TOY / "model" / file.name).write_bytes(file.read_bytes())


if __name__ == "__main__":
    main()
