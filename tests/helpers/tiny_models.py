"""Tiny random-weight models and tokenizers, for every test that needs one: no network, well under a second each.

``tiny_llama()`` gives a model in memory; with a folder it is also saved there, with a tokenizer, as an ordinary HF
folder. ``tiny(architecture)`` does the same for each LLaMA-like architecture. Weights are drawn larger than is usual,
so that logits differ enough between tokens for a mistake in any layer to show.
"""

from __future__ import annotations

import contextlib
import functools
import io
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from subspace.models.transformers_compat import unsharded_loading

VOCABULARY = 384

#: Settings with which a method's schedule acts within 20 steps.
EARLY_SCHEDULES: dict[str, dict[str, Any]] = {
    "lora-dash": {"launch": 5},
    "flexlora": {"every": 2},
    "adalora": {"every": 3},
}

#: One method of each kind: plain factors, a norm, a schedule, a decomposition, growing ranks, hooks, no adapter.
KINDS = {"lora", "dora", "adalora", "pissa", "flexlora", "prefix", "houlsby", "full"}

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

# What an architecture needs besides the sizes. The name is transformers' model_type.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 1024},
    "qwen2": {},  # biases on q, k and v
    "qwen3": {},  # norms on q and k
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 16},
    "gemma3_text": {"tie_word_embeddings": True, "query_pre_attn_scalar": 16},
    "phi3": {},  # fused projections
}

#: The same for mixtures of experts, each of which stores or computes its experts in a way of its own.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},  # transposed, with biases
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 128},  # transposed, all in one product
    "nemotron_h": {  # no gate
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
        "moe_shared_expert_intermediate_size": 32, "layers_block_type": ["attention", "moe"],
    },
}  # fmt: skip

TEXT = """The quick brown fox jumps over the lazy dog. A man is holding a book and reads it to his children.
Below is an instruction that describes a task. Write a response that appropriately completes the request.
### Instruction: Please answer the following question with true or false, question: is ice cream cold?
### Response: the correct answer is true. The correct answer is false. The correct answer is option1 or option2.
Please choose the correct answer to the question: where would you put a plate after a meal? Answer1: in the cupboard.
To remove a stain from a carpet, first dry it with a towel; then use water, soap, and a little patience.
Solution1: pour the milk into a bowl. Solution2: boil the eggs for 12 minutes. Ending3: she swims across the lake.
"""


def tiny(architecture: str, folder: Path | None = None, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a random model of an architecture, in eval mode; save it in ``folder``, with a tokenizer, if given."""
    own = ARCHITECTURES[architecture] if architecture in ARCHITECTURES else MIXTURES[architecture]
    config = AutoConfig.for_model(architecture, **{**SIZES, **own, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with unsharded_loading():  # whatever a training at ZeRO-3 in this process has left set
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms start as the identity and biases at zero, which would hide mistakes
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1 if "norm" in name else 0.3)
            elif "experts" in name and not parameter.is_meta and not parameter.any():  # as their biases
                parameter.data.normal_(std=0.15)
    if folder is not None:
        save(model, bpe_tokenizer(), folder)
    return model


def tiny_llama(folder: Path | None = None, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a random LLaMA: two layers, grouped queries, 64 wide, 384 tokens; see ``tiny``."""
    return tiny("llama", folder, seed=seed, **overrides)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model and a tokenizer as an ordinary HF folder, without a progress bar."""
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def bpe_tokenizer(**special: Any) -> PreTrainedTokenizerBase:
    """Build a byte-level BPE tokenizer in LLaMA-3's manner: it puts BOS first, has no pad token, but reserved ones.

    Args:
        **special: overrides of the special tokens, e.g. ``pad_token="<|end_of_text|>"``.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", **special}
    tokenizer = Tokenizer.from_str(_bpe_json())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)  # type: ignore[no-untyped-call]


@functools.cache
def _bpe_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return str(tokenizer.to_str())


@functools.cache
def sentencepiece_model() -> bytes:
    """Train a sentencepiece BPE model with LLaMA-2's options: byte fallback, ids 0 unk, 1 BOS, 2 EOS, no pad."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def save_sentencepiece(folder: Path) -> None:
    """Write LLaMA-2's tokenizer files into a model folder: a ``tokenizer.model``, and no ``tokenizer.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true, "add_eos_token": false, "legacy": false,'
        ' "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": null}'
    )
