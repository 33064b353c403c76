"""Canaries: every internal of transformers that the project uses is still there, and does what it is used for.

A failure names the upstream change; mend `subspace/models/transformers_compat.py`, and nothing else.
"""

from __future__ import annotations

import gc
import inspect
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from subspace.common.patching import patched
from subspace.models import transformers_compat as compat
from tests.helpers.tiny_models import MIXTURES, tiny, tiny_llama

VERSION = f"transformers {transformers.__version__}"


def test_the_attention_of_a_model_can_be_read() -> None:
    model = tiny_llama()
    model.set_attn_implementation("eager")
    assert compat.attention_kernel(model.config) == "eager", f"{VERSION} changed config._attn_implementation"


def test_an_attention_can_be_registered_beside_transformers_own() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = set(ALL_ATTENTION_FUNCTIONS)
    calls: list[str] = []

    def attention(fallback: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(fallback.__name__)
        return fallback(*args, **kwargs)

    compat.register_attention("canary", attention)
    assert set(ALL_ATTENTION_FUNCTIONS) - before == {"canary"}, f"{VERSION} changed AttentionInterface.register"
    model, ids = tiny_llama(), torch.arange(6)[None]
    expected = model(ids, use_cache=False).logits
    model.set_attn_implementation("canary")
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert calls == ["sdpa_attention_forward"] * model.config.num_hidden_layers


@pytest.mark.parametrize("packed", [False, True])
def test_whether_rows_are_packed_is_told_and_not_looked_for(packed: bool) -> None:
    model, ids = tiny_llama(), torch.arange(24).view(2, 12)
    positions = torch.cat([torch.arange(7), torch.arange(5)]).expand(2, -1) if packed else None
    expected = model(ids, position_ids=positions, use_cache=False).logits
    blame = f"{VERSION} changed masking_utils.find_packed_sequence_indices"

    def fail(positions: Any) -> None:
        raise AssertionError(f"{VERSION} looks for packed rows in another way")

    with patched(transformers.masking_utils, "find_packed_sequence_indices", fail), compat.known_packing(packed=packed):
        assert torch.equal(model(ids, position_ids=positions, use_cache=False).logits, expected), blame
    if packed:
        alone = model(ids[:, 7:], use_cache=False).logits
        assert torch.allclose(expected[:, 7:], alone, atol=1e-4), blame


def test_files_are_read_through_safe_open_in_modeling_utils(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    for folder in (ours, other):
        tiny_llama(folder)
    opened: list[Path] = []

    def open_file(file: str | Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(Path(file).parent)
        return safe_open(file, *args, **kwargs)

    with compat.reading_files_with(open_file, ours):
        for folder in (ours, other):
            transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert opened, f"{VERSION} no longer reads files through modeling_utils.safe_open"
    assert set(opened) == {ours}, "files of another folder were opened by our reader too"
    assert transformers.modeling_utils.safe_open is safe_open  # type: ignore[attr-defined]


def test_two_threads_that_load_models_leave_transformers_as_it_was(tmp_path: Path) -> None:
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with compat.reading_files_with(safe_open, tmp_path / "a"):
            inside.set()
            leave.wait(10)

    def second() -> None:
        with compat.reading_files_with(safe_open, tmp_path / "b"):
            pass

    one, two = threading.Thread(target=first), threading.Thread(target=second)
    one.start()
    assert inside.wait(10)
    two.start()
    leave.set()
    one.join(10)
    two.join(10)
    assert transformers.modeling_utils.safe_open is safe_open  # type: ignore[attr-defined]


def test_zero_3_loading_is_switched_by_an_object_that_is_kept_alive() -> None:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    engine = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    model = torch.nn.Linear(1, 1)
    compat.keep_alive_with(model, compat.zero3_loading(engine))
    gc.collect()
    assert is_deepspeed_zero3_enabled(), f"{VERSION} changed HfDeepSpeedConfig"  # type: ignore[no-untyped-call]
    assert not [name for name in vars(model) if "zero3" in name]
    assert compat.zero3_loading(None) is None
    assert not is_deepspeed_zero3_enabled(), f"{VERSION} changed unset_hf_deepspeed_config"  # type: ignore[no-untyped-call]
    kept = weakref.ref(compat._KEPT_ALIVE[model])
    del model
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(("kind", "causal", "masked"), [("llama", True, False), ("bert", True, True), ("vit", 0, 0)])
def test_decoders_and_encoders_are_told_apart(kind: str, causal: bool, masked: bool) -> None:
    assert compat.is_causal_lm(kind) == causal, f"{VERSION} changed MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
    assert compat.is_masked_lm(kind) == masked, f"{VERSION} changed MODEL_FOR_MASKED_LM_MAPPING_NAMES"


def test_the_marks_of_a_quantised_model_are_where_they_were() -> None:
    source = inspect.getsource(transformers.PreTrainedModel)
    for name in ("hf_quantizer", "is_quantized"):
        assert name in source, f"{VERSION} no longer marks quantised models by {name}"
    model: Any = tiny_llama()
    assert not compat.is_quantized(model)
    model.is_quantized, model.hf_quantizer, model.config.quantization_config = True, object(), {}
    assert compat.is_quantized(model)
    compat.mark_unquantized(model)
    assert not compat.is_quantized(model)
    assert not hasattr(model.config, "quantization_config")


def test_bitsandbytes_linears_are_put_in_without_files() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True)  # type: ignore[no-untyped-call]
    compat.replace_linears(model, quantization)
    kinds = {type(module).__name__ for module in model.modules()}
    assert "Linear4bit" in kinds, f"{VERSION} changed AutoHfQuantizer.preprocess_model"
    assert type(model.lm_head) is torch.nn.Linear


def test_a_model_names_its_layers() -> None:
    layers = compat.decoder_layers(tiny_llama())
    assert [type(layer).__name__ for layer in layers] == ["LlamaDecoderLayer"] * 2, f"{VERSION}: _no_split_modules"


def test_attention_and_embedding_have_what_prefixes_and_prompts_read() -> None:
    numbers = [compat.layer_number(layer.self_attn) for layer in compat.decoder_layers(tiny_llama())]
    assert numbers == [0, 1], f"{VERSION} changed attention.layer_idx"
    gemma = tiny("gemma2")
    expected = gemma.config.hidden_size**0.5
    gain = compat.embedding_gain(gemma.get_input_embeddings())
    assert gain == pytest.approx(expected, rel=1e-2), f"{VERSION} changed scalar_embed_scale of Gemma's embedding"
    assert compat.embedding_gain(tiny_llama().get_input_embeddings()) == 1.0


def test_a_patch_of_a_name_that_is_gone_is_an_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"), patched(transformers, "no_such_name", None):
        pass


def test_a_patch_ends_with_its_block_and_leaves_no_attribute_behind() -> None:
    layer = torch.nn.Linear(1, 1)
    with pytest.raises(ZeroDivisionError), patched(layer, "forward", lambda x: 1 / x):
        layer(0)
    assert "forward" not in vars(layer)


def test_models_that_keep_a_state_say_so() -> None:
    from transformers import JambaForCausalLM, LlamaForCausalLM

    told = [compat.is_stateful(kind) for kind in (JambaForCausalLM, LlamaForCausalLM)]
    assert told == [True, False], f"{VERSION} changed _is_stateful"


def test_experts_say_how_their_matrices_lie_where_their_shapes_do_not() -> None:
    blame = f"{VERSION} changed is_transposed, which use_experts_implementation sets"
    for architecture in MIXTURES:
        model = tiny(architecture)
        modules = [module for name, module in model.named_modules() if name.endswith(".experts")]
        assert modules
        for experts in modules:
            if architecture != "llama4_text":
                assert experts.is_transposed is (architecture == "gpt_oss"), blame
            shapes = {name: tuple(p.shape) for name, p in experts.named_parameters() if p.ndim == 3}
            assert compat.experts_are_transposed(experts, shapes) is (architecture in ("gpt_oss", "llama4_text"))
    assert compat.experts_are_transposed(torch.nn.Conv1d(2, 3, 4), {"weight": (3, 2, 4)}) is None


def test_a_mixture_tells_how_many_experts_a_token_has() -> None:
    assert [compat.experts_per_token(tiny(name).config, 99) for name in MIXTURES] == [2, 2, 2, 1, 2]
    assert compat.experts_per_token(tiny_llama().config, 99) == 99


def test_routers_and_layers_that_are_passed_by_are_known() -> None:
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer
    from transformers.models.llama4.modeling_llama4 import Llama4Router
    from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    blame = f"{VERSION} changed how state-space mixers read their layers' weights"
    for kind, layers in ((JambaMambaMixer, {"dt_proj"}), (GraniteMoeHybridMambaLayer, {"out_proj"})):
        mixer = object.__new__(kind)
        mixer.__dict__["A_log"] = None
        assert {name for name in compat.bypassed_layers(mixer) if name.endswith("proj")} == layers, blame
    delta = object.__new__(Qwen3NextGatedDeltaNet)
    delta.__dict__["A_log"] = None
    assert not {name for name in compat.bypassed_layers(delta) if name.endswith("proj")}, blame
    assert not compat.bypassed_layers(tiny_llama())
    for router in (Llama4Router, PhimoeTopKRouter):
        assert compat.is_router(object.__new__(router)), f"{VERSION} renamed its routers"
        assert issubclass(router, torch.nn.Linear)


def test_what_is_looked_at_beside_a_sharded_model_is_loaded_whole() -> None:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    kept = compat.zero3_loading({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()  # type: ignore[no-untyped-call]
    with compat.unsharded_loading():
        assert not is_deepspeed_zero3_enabled(), f"{VERSION} changed unset_hf_deepspeed_config"  # type: ignore[no-untyped-call]
    assert is_deepspeed_zero3_enabled(), f"{VERSION} changed _hf_deepspeed_config_weak_ref"  # type: ignore[no-untyped-call]
    assert kept
    compat.zero3_loading(None)
