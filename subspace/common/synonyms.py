"""What settings and values are called elsewhere: by the HF Trainer, PEFT, bitsandbytes, LLaMA-Factory, axolotl, habit.

Messages about an unknown setting or value look here before they look for a similar word. Each entry says what to write
instead: a setting, or several with their values, perhaps with a few words after a colon.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from subspace.errors import nearest

_BATCH = "train.batch_size: the rows of an optimizer step, over all processes and micro-batches"
_MICRO = "train.micro_batch_size"
_VALIDATE = (
    "train.validate_every: optimizer steps; or train.save_final=best or train.patience, which validate once an epoch"
)
_MODEL, _DATA, _LENGTH, _TARGETS = "model.path", "data.mixture", "data.max_length", "targets"
_OF_TRAIN = ("learning_rate", "epochs", "steps", "batch_size", "warmup_steps", "weight_decay", "optimizer", "schedule")
_PROCESSES = "--processes N: on the command line"

#: By the name elsewhere, in small letters and with ``_`` for ``-``.
SETTINGS: Mapping[str, str] = {
    # habit
    "lr": "train.learning_rate",
    "rank": "method.r",
    "lora_r": "method.r",
    "alpha": "method.alpha",
    "dropout": "method.dropout",
    "bf16": "model.dtype=bfloat16",
    "fp16": "model.dtype=float16",
    "fp32": "model.dtype=float32",
    "4bit": "model.quantize=nf4",
    "8bit": "model.quantize=int8",
    "qlora": "method=lora model.quantize=nf4",
    "bs": "train.batch_size",
    "wd": "train.weight_decay",
    "out": "name=NAME: the run is saved in RUNS/NAME",
    "output": "name=NAME: the run is saved in RUNS/NAME",
    "gpus": _PROCESSES,
    "resume": "--resume: on the command line",
    "checkpoint": "--resume: on the command line, which takes the newest",
    "wandb": "train.trackers=wandb",
    # ours, where they stand in no section, or in another
    **{name: f"train.{name}" for name in _OF_TRAIN},
    **{name: f"model.{name}" for name in ("dtype", "quantize", "attention", "revision")},
    **{name: f"data.{name}" for name in ("mixture", "packing", "validation")},
    **{name: f"evaluate.{name}" for name in ("tasks", "protocol")},
    # HF Trainer
    "output_dir": "name=NAME: the run is saved in RUNS/NAME",
    "run_name": "name",
    "per_device_train_batch_size": _MICRO,
    "per_device_eval_batch_size": "evaluate.batch_tokens: tokens and not rows",
    "per_gpu_train_batch_size": _MICRO,
    "train_batch_size": _BATCH,
    "eval_batch_size": "evaluate.batch_tokens: tokens and not rows",
    "gradient_accumulation_steps": _BATCH,
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "warmup_ratio": "train.warmup_steps: a number of steps; null is at most a tenth of the run",
    "warmup": "train.warmup_steps",
    "num_warmup_steps": "train.warmup_steps",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule",
    "scheduler": "train.schedule",
    "optim": "train.optimizer",
    "adam8bit": "train.optimizer=adamw8bit",
    "max_grad_norm": "train.max_grad_norm",
    "clip_grad_norm": "train.max_grad_norm",
    "logging_steps": "train.log_every",
    "save_steps": "train.save_every",
    "save_strategy": "train.save_every: optimizer steps; 0 is never",
    "save_total_limit": "train.keep_checkpoints",
    "eval_steps": _VALIDATE,
    "eval_strategy": _VALIDATE,
    "evaluation_strategy": _VALIDATE,
    "load_best_model_at_end": "train.save_final=best",
    "early_stopping_patience": "train.patience",
    "report_to": "train.trackers",
    "torch_compile": "train.compile",
    "use_liger_kernel": "train.liger",
    "activation_offloading": "train.offload_activations",
    "adapter_name_or_path": "train.start_from",
    "lora_model_dir": "train.start_from",
    "resume_from_checkpoint": "--resume: on the command line",
    "deepspeed": "engine",
    "fsdp": "engine=ds_configs/zero3.json: which shards the model over the processes",
    "num_processes": _PROCESSES,
    "nproc_per_node": _PROCESSES,
    "num_gpus": _PROCESSES,
    "data_seed": "train.seed",
    "completion_only_loss": "data.loss_on=answers",
    "assistant_only_loss": "data.loss_on=answers",
    # transformers and bitsandbytes
    "model_name_or_path": _MODEL,
    "model_name": _MODEL,
    "pretrained_model_name_or_path": _MODEL,
    "base_model": _MODEL,
    "model_id": _MODEL,
    "model_revision": "model.revision",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "attn_implementation": "model.attention",
    "flash_attn": "model.attention=flash_attention_2",
    "flash_attention": "model.attention=flash_attention_2",
    "use_flash_attention_2": "model.attention=flash_attention_2",
    "load_in_4bit": "model.quantize=nf4",
    "load_in_8bit": "model.quantize=int8",
    "bnb_4bit_quant_type": "model.quantize=nf4: or fp4",
    "bnb_4bit_use_double_quant": "model.double_quant",
    "bnb_4bit_compute_dtype": "model.dtype",
    "quantization": "model.quantize",
    "quantization_bit": "model.quantize=nf4: for 4 bits, and int8 for 8",
    "quantization_method": "model.quantize",
    "double_quantization": "model.double_quant",
    "enable_gradient_checkpointing": "model.gradient_checkpointing",
    "use_gradient_checkpointing": "model.gradient_checkpointing",
    # PEFT
    "peft_type": "method",
    "lora_rank": "method.r",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "target_modules": _TARGETS,
    "use_rslora": "method.rslora",
    "use_dora": "method=dora",
    "init_lora_weights": "method: pissa and milora start from the weights",
    "rank_pattern": "method.patterns",
    "alpha_pattern": "method.patterns",
    "layers_to_transform": "targets: a regular expression, as '.*layers\\.(0|1)\\..*_proj'",
    "num_virtual_tokens": "method.n",
    "loraplus_lr_ratio": "train.lora_plus_lr_ratio",
    # LLaMA-Factory
    "finetuning_type": "method",
    "lora_target": _TARGETS,
    "pissa_init": "method=pissa",
    "dataset": _DATA,
    "dataset_dir": "data.mixture: a path",
    "eval_dataset": "data.validation: rows held out of the data",
    "cutoff_len": _LENGTH,
    "max_samples": "data.limit",
    "val_size": "data.validation: a number of rows",
    "template": "data.chat_template: of a file; or data.prompt",
    "train_on_prompt": "data.loss_on=all",
    "mask_history": "data.loss_on=last-answer",
    # axolotl
    "adapter": "method",
    "sequence_len": _LENGTH,
    "sample_packing": "data.packing",
    "val_set_size": "data.validation: a number of rows",
    "datasets": _DATA,
    "train_on_inputs": "data.loss_on=all",
    "lora_target_modules": _TARGETS,
    "lora_target_linear": "targets=all-linear",
    "wandb_project": "train.trackers=wandb",
    "gradient_clipping": "train.max_grad_norm",
    # TRL and others
    "max_seq_length": _LENGTH,
    "max_seq_len": _LENGTH,
    "model_max_length": _LENGTH,
    "block_size": _LENGTH,
    "dataset_name": _DATA,
    "data_path": _DATA,
    "train_file": _DATA,
    "train_data": _DATA,
    "dataset_text_field": "data.columns",
    "num_fewshot": "evaluate.examples",
    "split_name": "evaluate.split",
}

_NONE = dict.fromkeys(("no", "off", "null", "false", "disabled"), "none")

#: By a setting of ours and a value elsewhere: what to write. ``method`` and ``targets`` are settings too.
VALUES: Mapping[str, Mapping[str, str]] = {
    "model.dtype": {
        **dict.fromkeys(("bf16", "bfloat", "torch.bfloat16", "mixed", "auto"), "bfloat16"),
        **dict.fromkeys(("fp16", "half", "f16", "torch.float16", "16"), "float16"),
        **dict.fromkeys(("fp32", "f32", "full", "float", "single", "torch.float32", "32"), "float32"),
    },
    "model.quantize": {
        **dict.fromkeys(("4bit", "4", "int4", "q4", "bnb_4bit", "bitsandbytes", "bnb", "qlora", "true"), "nf4"),
        **dict.fromkeys(("8bit", "8", "q8", "bnb_8bit", "llm.int8"), "int8"),
        **_NONE,
    },
    "model.attention": {
        **dict.fromkeys(("flash", "fa2", "flash_attn", "flash_attention", "flash2", "fa3"), "flash_attention_2"),
        **dict.fromkeys(("torch", "xformers", "auto", "default", "flex_attention"), "sdpa"),
        **dict.fromkeys(("math", "naive", "none"), "eager"),
    },
    "train.optimizer": {
        **dict.fromkeys(("adam", "adamw_torch", "adamw_hf", "adamw_torch_fused", "adamw_bf16", "sgd"), "adamw"),
        **dict.fromkeys(("adamw_8bit", "adam8bit", "adamw_bnb_8bit", "8bit"), "adamw8bit"),
        **dict.fromkeys(("paged_adamw_32bit", "paged", "paged_adam"), "paged_adamw"),
        **dict.fromkeys(("paged_adamw_8bit", "paged_8bit"), "paged_adamw8bit"),
    },
    "train.schedule": {
        "constant_with_warmup": "constant",
        "linear_with_warmup": "linear",
        **dict.fromkeys(("cosine_with_restarts", "cosine_annealing", "cosine_with_min_lr"), "cosine"),
        **dict.fromkeys(("none", "fixed"), "constant"),
    },
    "train.trackers": {
        **dict.fromkeys(("none", "no", "off", "null", "false", "disabled"), "[]"),
        "tb": "tensorboard",
        "all": "tensorboard,wandb",
    },
    "train.save_final": {"final": "last", "newest": "last", "best_model": "best", "true": "best"},
    "data.loss_on": {
        **dict.fromkeys(("answer", "completion", "completions", "response", "responses", "assistant"), "answers"),
        **dict.fromkeys(("prompt", "inputs", "full", "everything"), "all"),
        **dict.fromkeys(("last", "last-turn", "last_turn"), "last-answer"),
    },
    "data.bad_rows": {
        **dict.fromkeys(("skip", "ignore"), "drop"),
        **dict.fromkeys(("error", "raise", "fail"), "refuse"),
    },
    "data.too_long": {
        **dict.fromkeys(("skip", "ignore"), "drop"),
        **dict.fromkeys(("error", "raise", "fail"), "refuse"),
    },
    "evaluate.protocol": {
        **dict.fromkeys(("loglikelihood", "logprob", "lm-eval", "lm_eval", "harness", "acc"), "likelihood"),
        **dict.fromkeys(("generate", "generation", "generative", "llm_adapters"), "llm-adapters"),
    },
    "method": {
        "qlora": "method=lora model.quantize=nf4",
        "qdora": "method=dora model.quantize=nf4",
        "loraplus": "method=lora train.lora_plus_lr_ratio=16",
        "lora+": "method=lora train.lora_plus_lr_ratio=16",
        **dict.fromkeys(("fft", "full-finetuning", "full-fine-tuning", "full-ft", "sft", "none"), "method=full"),
        **dict.fromkeys(("prompt-tuning", "soft-prompt"), "method=prompt"),
        **dict.fromkeys(("prefix-tuning",), "method=prefix"),
        **dict.fromkeys(("p-tuning-v2",), "method=prefix"),
        **dict.fromkeys(("ptuning", "p-tuning-v1"), "method=p-tuning"),
        **dict.fromkeys(("adapter", "adapters", "adapterh", "houlsby-adapter", "bottleneck"), "method=houlsby"),
        **dict.fromkeys(("adapterp", "pfeiffer-adapter"), "method=pfeiffer"),
        "bias": "method=bitfit",
    },
    "targets": {
        **dict.fromkeys(("all", "all_linear", "linear", "alllinear"), "all-linear"),
        **dict.fromkeys(("query", "q"), "q_proj"),
        **dict.fromkeys(("key", "k"), "k_proj"),
        **dict.fromkeys(("value", "v"), "v_proj"),
        **dict.fromkeys(("o", "out_proj"), "o_proj"),
        **dict.fromkeys(("qkv",), "q_proj,k_proj,v_proj"),
        **dict.fromkeys(("attn", "attention", "self_attn"), "q_proj,k_proj,v_proj,o_proj"),
        **dict.fromkeys(("mlp", "ffn"), "gate_proj,up_proj,down_proj"),
    },
}


def setting_elsewhere(word: str) -> str | None:
    """Return what to write for a setting by its name elsewhere, ``--lr`` or ``train.lr`` say; None if it is unknown."""
    plain = re.sub(r"^-+", "", word).partition("=")[0].casefold().replace("-", "_")
    return SETTINGS.get(plain) or SETTINGS.get(plain.rpartition(".")[2])


def value_elsewhere(setting: str, value: object) -> str | None:
    """Return what to write for a value by its name elsewhere, as ``bfloat16`` for ``bf16``; None if it is unknown."""
    known = VALUES.get(re.sub(r"^method\.(\d+\.)?name$", "method", setting), {})
    plain = str(value).strip().casefold()
    return known.get(plain) or known.get(plain.replace("_", "-"))


def hint(setting: str, value: object, known: Iterable[str], command: str = "") -> str:
    """Return what to write for a value that a setting does not have: its name here, or the nearest words.

    Args:
        setting: by its whole name.
        value: what was given.
        known: what there is.
        command: what lists it, as of :func:`~subspace.errors.nearest`.
    """
    if called := value_elsewhere(setting, value):
        return f"Here it is {called if '=' in called else f'{setting}={called}'}"
    return nearest(str(value), known, command)
