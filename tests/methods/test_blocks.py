"""Methods that are no new factors: bottlenecks, virtual tokens, biases, full fine-tuning. Each worked out by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from subspace.adapters.base import Adapter
from subspace.adapters.inject import adapters, inject, parameter_roles, remove_adapters, trained_parameters
from subspace.adapters.merging import merge, unmerge
from subspace.adapters.registry import resolve_method
from subspace.adapters.serialization import load_adapter, save_adapter
from subspace.errors import UserError
from subspace.evaluation.choice_scoring import build_scoring_rows, score_choices
from subspace.evaluation.greedy_decoding import decode_greedily
from subspace.methods.lora import LoRA
from subspace.methods.parallel import Parallel
from subspace.models.config import ModelConfig
from subspace.models.loading import open_model
from tests.helpers.adapter_files import unseal
from tests.helpers.tiny_models import ARCHITECTURES, SIZES, tiny, tiny_llama

IDS = torch.tensor([[5, 9, 33, 7, 120, 64, 3, 17], [8, 8, 250, 31, 2, 90, 4, 11]])
W = torch.tensor([[1.0, 2.0, 2.0], [0.0, 3.0, 4.0]])
X = torch.tensor([1.0, -1.0, 2.0])  # W X = (3, 5)


def logits(model: Any, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(**{"input_ids": IDS, "use_cache": False, **arguments}).logits  # type: ignore[no-any-return]


def perturb(model: nn.Module, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(4)
    for parameter in trained_parameters(model).values():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def adapted(architecture: str, method: str, settings: dict[str, Any] | None = None, **options: Any) -> PreTrainedModel:
    model = tiny(architecture, **options)
    inject(model, method, settings, seed=3)
    perturb(model)
    return model


def at(name: str, tensors: dict[str, Any], base: nn.Module | None = None, **settings: Any) -> Adapter:
    """Make one adapter with these tensors, at a linear layer of weight W where no other module is given."""
    if base is None:
        base = nn.Linear(3, 2, bias=False)
        base.weight.data = W.clone()
    cls = resolve_method(name)[0]
    adapter = cls(base, cls.Config(**settings))
    for key, value in tensors.items():
        adapter.trained()[key].data = torch.tensor(value)
    return adapter


# Counts

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA3_8B = {**LLAMA_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}


@pytest.mark.parametrize(
    ("method", "settings", "shape", "count"),
    [
        ("houlsby", {"bottleneck": 32}, LLAMA_7B, 17_041_408),
        ("pfeiffer", {"bottleneck": 32}, LLAMA_7B, 8_520_704),
        ("series", {}, LLAMA_7B, 67_108_864),
        ("parallel", {}, LLAMA_7B, 247_463_936),
        ("parallel", {"site": "ffn", "bottleneck": 512}, LLAMA_7B, 32 * 512 * 2 * 4096),
        ("bitfit", {}, LLAMA_7B, 876_544),
        ("prompt", {}, LLAMA_7B, 81_920),
        ("p-tuning", {"hidden": 4096}, LLAMA_7B, 50_425_856),
        ("prefix", {}, LLAMA_7B, 7_864_320),
        ("prefix", {}, LLAMA3_8B, 1_966_080),
        ("full", {}, LLAMA_7B, 6_738_415_616),
    ],
)
def test_published_counts(method: str, settings: dict[str, Any], shape: dict[str, int], count: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape))  # type: ignore[no-untyped-call]
    inject(model, method, settings)
    assert sum(parameter.numel() for parameter in trained_parameters(model).values()) == count


# Bottlenecks


def test_series_is_tanh_without_biases() -> None:
    adapter = at("series", {"D": [[1.0, -1.0]], "U": [[2.0], [1.0]]}, bottleneck=1)
    # h = (3, 5), D h = -2.
    tanh = torch.tanh(torch.tensor(-2.0))
    assert torch.allclose(adapter(X), torch.stack([3 + 2 * tanh, 5 + tanh]))
    assert adapter.trained().keys() == {"D", "U"}


def test_pfeiffer_is_relu_with_biases() -> None:
    tensors = {"D": [[1.0, -1.0]], "U": [[2.0], [1.0]], "c": [2.5], "e": [0.0, 1.0]}
    # D h + c = 0.5.
    assert torch.allclose(at("pfeiffer", tensors, bottleneck=1)(X), torch.tensor([4.0, 6.5]))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3", "olmo2"])
def test_pfeiffer_reads_the_residual_stream_as_adapterhubs_does(architecture: str, checkpointing: bool) -> None:
    """Against AdapterHub's wiring, written out; gradients too."""
    sizes = {**SIZES, "pad_token_id": 0}
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes))  # type: ignore[no-untyped-call]
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    theirs = copy.deepcopy(model)
    found = inject(model, "pfeiffer", {"bottleneck": 8})
    perturb(model)
    weights = {
        site: {k: p.detach().clone().requires_grad_() for k, p in a.trained().items()} for site, a in found.items()
    }
    for number, layer in enumerate(theirs.model.layers):
        p, down = weights[f"model.layers.{number}.mlp.down_proj"], layer.mlp.down_proj
        norm = {"gemma2": "pre_feedforward_layernorm", "olmo2": ""}.get(architecture, "post_attention_layernorm")
        stream: list[Tensor] = []
        of = getattr(layer, norm) if norm else layer.mlp
        of.register_forward_pre_hook(lambda module, args, stream=stream: stream.append(args[0]))
        plain = type(down).forward

        def forward(x: Tensor, p: Any = p, down: Any = down, stream: Any = stream, plain: Any = plain) -> Tensor:
            h = plain(down, x)
            return h + F.linear(F.relu(F.linear(h + stream[-1], p["D"], p["c"])), p["U"], p["e"])  # type: ignore[no-any-return]

        down.forward = forward
    for one in (model, theirs):
        one.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert torch.equal(logits(model.eval()), logits(theirs.eval()))
    for site, adapter in found.items():
        for name, parameter in adapter.trained().items():
            torch.testing.assert_close(parameter.grad, weights[site][name].grad)


def test_a_pfeiffer_adapter_of_an_earlier_version_reads_what_it_read(tmp_path: Path) -> None:
    model = adapted("llama", "pfeiffer", {"bottleneck": 8, "residual": False})
    file = save_adapter(model, tmp_path / "adapter") / "adapter.json"
    content = json.loads(file.read_text())
    for group in content["adapters"]:
        del group["settings"]["residual"]
    file.write_text(json.dumps(content))
    unseal(file.parent)
    other = tiny_llama()
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits(other), logits(model))
    assert not torch.equal(logits(other), logits(tiny_llama()))


def test_pfeiffers_hooks_go_with_it() -> None:
    model = adapted("llama", "pfeiffer", {"bottleneck": 8})
    assert not torch.equal(logits(model), logits(tiny_llama()))
    remove_adapters(model)
    assert torch.equal(logits(model), logits(tiny_llama()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "series"])
def test_the_published_start_is_near_the_frozen_model_and_not_on_it(method: str) -> None:
    model = tiny_llama()
    inject(model, method, {"start": "gaussian"})
    assert all(0.015 < p.std() < 0.025 for n, p in trained_parameters(model).items() if n[-1] in "DU")
    assert 0 < (logits(model) - logits(tiny_llama())).norm() < 0.2 * logits(tiny_llama()).norm()


@pytest.mark.parametrize(
    ("method", "ends"),
    [("houlsby", ["o_proj", "down_proj"]), ("pfeiffer", ["down_proj"]), ("series", ["down_proj"])],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bottlenecks_stand_behind_sublayers(architecture: str, method: str, ends: list[str]) -> None:
    sites = inject(tiny(architecture), method)
    assert [site.rpartition(".")[2] for site in sites] == ends * 2


def test_a_linear_series_adapter_is_a_new_down_projection() -> None:
    """Without its nonlinearity it folds into the layer before it, which proves where it stands."""
    model = adapted("llama", "series", {"bottleneck": 4})
    plain = tiny_llama()
    for site, adapter in adapters(model).items():
        adapter.f = lambda hidden: hidden  # type: ignore[assignment]
        layer, trained = plain.get_submodule(site), adapter.trained()
        layer.weight.data += trained["U"] @ trained["D"] @ layer.weight  # type: ignore[operator]
    assert torch.allclose(logits(model), logits(plain), atol=1e-4)
    assert not torch.allclose(logits(model), logits(tiny_llama()), atol=0.1)


# Parallel


def test_parallel() -> None:
    tensors = {"A": [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], "B": [[1.0, 5.0], [-1.0, 5.0]]}
    # A x = (3, -1), which relu turns to (3, 0); B of that is (3, -3).
    assert torch.allclose(at("parallel", tensors, bottleneck=2, scale=2.0)(X), torch.tensor([9.0, -1.0]))


def test_parallel_is_lora_with_a_relu() -> None:
    def made(cls: Any, config: Any) -> Any:
        torch.manual_seed(1)
        adapter = cls(nn.Linear(6, 5), config)
        adapter.B.data.normal_()
        return adapter

    lora, parallel = (
        made(LoRA, LoRA.Config(r=4, alpha=6, constraint="nonlinear")),
        made(Parallel, Parallel.Config(bottleneck=4, scale=1.5)),
    )
    parallel.base = lora.base
    x = torch.randn(7, 6)
    assert torch.equal(lora(x), parallel(x))
    assert not torch.allclose(lora(x), lora.base(x), atol=0.1)


def test_beside_a_feed_forward_block() -> None:
    model = tiny_llama()
    (site, adapter), _ = inject(model, "scaled-parallel", {"bottleneck": 8}).items()
    perturb(model)
    assert site == "model.layers.0.mlp"
    x, (A, B) = torch.randn(2, 3, 64), adapter.trained().values()
    assert torch.allclose(adapter(x), tiny_llama().model.layers[0].mlp(x) + 4 * torch.relu(x @ A.T) @ B.T, atol=1e-4)


# Biases


def test_bitfit() -> None:
    assert torch.allclose(at("bitfit", {"beta": [0.5, -1.0]})(X), torch.tensor([3.5, 4.0]))


def test_bitfit_of_the_biases_there_are() -> None:
    sites = inject(tiny("qwen2"), "bitfit", {"create": False})
    assert {site.rpartition(".")[2] for site in sites} == {"q_proj", "k_proj", "v_proj"}


def test_bitfit_without_a_bias_is_told_to_create_one() -> None:
    with pytest.raises(UserError, match=r"bitfit fits none of the 10 sites.*q_proj has no bias.*`create: true`"):
        inject(tiny_llama(), "bitfit", {"create": False})


# Virtual tokens

VIRTUAL = ["prompt", "p-tuning"]


def with_vectors_by_hand(model: Any, ids: Tensor) -> Tensor:
    """Compute a prompted model's logits in the way that the papers tell: embed, put the vectors in front, read on."""
    (adapter,) = adapters(model).values()
    vectors = adapter.vectors()  # type: ignore[operator]
    plain = copy.deepcopy(model)
    remove_adapters(plain)
    embedded = plain.get_input_embeddings()(ids)
    embedded = torch.cat([vectors.expand(len(ids), -1, -1), embedded], dim=1)
    with torch.no_grad():
        return plain(inputs_embeds=embedded, use_cache=False).logits[:, len(vectors) :]  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", VIRTUAL)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vectors_stand_before_the_text(architecture: str, method: str) -> None:
    model = adapted(architecture, method, {"n": 3})
    left = torch.ones_like(IDS)
    left[0, :3] = 0
    assert torch.allclose(logits(model), with_vectors_by_hand(model, IDS), atol=1e-4)
    padded = logits(model, attention_mask=left)
    assert torch.allclose(padded[1:], with_vectors_by_hand(model, IDS[1:]), atol=1e-4)
    assert torch.allclose(padded[:1, 3:], with_vectors_by_hand(model, IDS[:1, 3:]), atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompted_models_decode_alike_in_a_batch(architecture: str) -> None:
    model = adapted(
        architecture, "prompt", {"n": 3}, attn_implementation="eager" if architecture == "gemma2" else "sdpa"
    )
    prompts = [[5, 9, 33, 7, 120], [8, 8], [250, 31, 2, 90, 4, 11, 6, 3]]

    def alone(ids: list[int]) -> list[int]:
        for _ in range(6):
            ids = [*ids, int(with_vectors_by_hand(model, torch.tensor([ids]))[0, -1].argmax())]
        return ids[-6:]

    with torch.no_grad():
        written = decode_greedily(model, prompts, lambda _: False, max_new_tokens=6)
    assert written == [alone(ids) for ids in prompts]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prompted_models_read_trees(attention: str) -> None:
    model = adapted("llama", "prompt", {"n": 3}, attn_implementation=attention)
    texts = [[5, 9, 33, 7, 120, 64], [5, 9, 33, 8, 2], [5, 9, 33, 8, 90, 4, 11]]
    with torch.no_grad():
        (scores,) = score_choices(model, build_scoring_rows([(ids, 3) for ids in texts], 2048, share=True))
    for ids, score in zip(texts, scores, strict=True):
        told = with_vectors_by_hand(model, torch.tensor([ids])).log_softmax(-1)[0]
        assert score == pytest.approx(sum(float(told[i - 1, ids[i]]) for i in range(3, len(ids))), abs=1e-4)


def test_a_prompt_that_comes_out_leaves_nothing_behind() -> None:
    model = adapted("llama", "prompt")
    remove_adapters(model)
    assert torch.equal(logits(model), logits(tiny_llama()))
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])  # Gemma multiplies its embedding
def test_a_prompt_starts_at_tokens(architecture: str) -> None:
    model = tiny(architecture)
    everything = model.get_input_embeddings()(torch.arange(384))
    (adapter,) = inject(model, "prompt", {"n": 30}).values()
    distances = torch.cdist(adapter.trained()["P"], everything)
    assert distances.min(dim=1).values.max() < 1e-2
    assert len(set(distances.argmin(dim=1).tolist())) > 20


def test_p_tuning_network() -> None:
    tensors = {"Z": [[1.0, -1.0]], "W1": [[1.0, 0.0], [0.0, 1.0]], "b1": [0.0, 3.0], "W2": [[1.0, -1.0], [1.0, 1.0]]}
    tensors |= {"b2": [0.0, 0.0], "W3": [[1.0, 1.0], [2.0, 0.0]], "b3": [0.5, 0.5]}
    # W1 z + b1 = (1, 2); W2 of that is (-1, 3), which relu turns to (0, 3).
    adapter = at("p-tuning", tensors, nn.Embedding(4, 2), n=1, hidden=2)
    assert torch.allclose(adapter.vectors(), torch.tensor([[3.5, 0.5]]))  # type: ignore[operator]


def test_embeddings_in_place_of_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="prompt puts vectors before a text's tokens: give the model `input_ids`"):
        adapted("llama", "prompt")(inputs_embeds=torch.zeros(1, 3, 64))


def test_a_zero_prefix_takes_its_share() -> None:
    model = tiny_llama()
    inject(model, "prefix", {"std": 0.0})
    assert (logits(model) - logits(tiny_llama())).abs().max() > 0.1


def test_a_prefix_comes_out_of_its_network() -> None:
    model = adapted("llama", "prefix", {"n": 3, "hidden": 4})
    plain = adapted("llama", "prefix", {"n": 3})
    for site, adapter in adapters(model).items():
        Z, W1, b1, W2, b2 = (adapter.trained()[name] for name in ("Z", "W1", "b1", "W2", "b2"))
        rows = torch.tanh(Z @ W1.T + b1) @ W2.T + b2  # of each virtual token: its keys head by head, then its values
        for name, part in zip(("K", "V"), rows.chunk(2, dim=1), strict=True):
            heads = part.detach().reshape(3, 2, 16)
            adapters(plain)[site].trained()[name].data = heads.transpose(0, 1)
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
    assert (logits(model) - logits(tiny_llama())).abs().max() > 0.1
    model(IDS, use_cache=False).logits.square().sum().backward()
    trained = trained_parameters(model)
    assert len(trained) == 10
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_closed_gate_is_the_frozen_model_and_an_open_one_the_plain_prefix(attention: str) -> None:
    def gated(start: float | None) -> Any:
        model = tiny_llama()
        model.set_attn_implementation(attention)
        inject(model, "prefix", {"n": 3, "gate": start}, seed=3)
        return model

    assert torch.allclose(logits(gated(-30.0)), logits(tiny_llama()), atol=1e-5)
    assert torch.allclose(logits(gated(0.0)), logits(gated(None)), atol=1e-5)
    near, model = logits(gated(-3.0)), gated(-3.0)
    assert 0.001 < (near - logits(tiny_llama())).abs().max() < (logits(gated(0.0)) - logits(tiny_llama())).abs().max()
    model(IDS, use_cache=False).logits.square().sum().backward()
    assert all(p.grad.abs().min() > 0 for name, p in trained_parameters(model).items() if name.endswith("gate"))  # type: ignore[union-attr]


def test_the_order_of_a_prefix_is_free() -> None:
    model = adapted("llama", "prefix", {"n": 5})
    before, order = logits(model), torch.tensor([3, 0, 4, 1, 2])
    for parameter in trained_parameters(model).values():
        parameter.data = parameter.data[:, order]
    assert torch.allclose(logits(model), before, atol=1e-4)


# Full fine-tuning

TIED = ["gemma", "gemma2", "gemma3_text"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_trains_every_number_once(architecture: str) -> None:
    model = tiny(architecture)
    names, count = list(dict(model.named_parameters())), model.num_parameters()
    inject(model, "full")
    assert list(trained_parameters(model)) == names
    assert sum(parameter.numel() for parameter in trained_parameters(model).values()) == count
    assert parameter_roles(model).keys() == trained_parameters(model).keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_full_decays_matrices_only() -> None:
    model = tiny("qwen2")
    inject(model, "full")
    by_role = {
        role: {n for n, r in parameter_roles(model).items() if r == role} for role in parameter_roles(model).values()
    }
    assert by_role.keys() == {"weight", "bias", "scale"}
    assert all(name.endswith("norm.weight") for name in by_role["scale"])
    assert not any("norm" in name for name in by_role["weight"])


@pytest.mark.parametrize("architecture", TIED)
def test_what_is_tied_stays_tied(architecture: str, tmp_path: Path) -> None:
    model = adapted(architecture, "full")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_adapter(model, tmp_path / "adapter")
    fresh = tiny(architecture)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))
    stored = sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors"))
    assert stored < 4 * model.num_parameters() + 10_000

    unmerged = logits(model)
    merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert torch.equal(logits(model), unmerged)
    unmerge(model)
    remove_adapters(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(tiny(architecture)))


def test_a_tied_module_alone_is_refused() -> None:
    with pytest.raises(UserError, match="tied to lm_head. Target both"):
        inject(tiny("gemma"), "full", targets=["embed_tokens"])


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_full_computes_in_the_models_dtype_and_trains_in_float32(architecture: str) -> None:
    model, frozen = tiny(architecture, dtype=torch.bfloat16), tiny(architecture, dtype=torch.bfloat16)
    model.bfloat16(), frozen.bfloat16()
    inject(model, "full")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(logits(model), logits(frozen))
    assert logits(model).dtype == torch.bfloat16
    for parameter in trained_parameters(model).values():
        parameter.data += 1e-5  # bfloat16 would lose most of it
    assert all((p - q.float()).norm() > 0 for p, q in zip(model.parameters(), frozen.parameters(), strict=True))


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_full_refuses_a_quantised_base(tmp_path: Path, quantize: str) -> None:
    tiny_llama(tmp_path)
    model = open_model(ModelConfig(path=str(tmp_path), dtype="float32", quantize=quantize))
    with pytest.raises(UserError, match="full was asked for.*(4bit|int8) numbers have no gradient.*quantize: none"):
        inject(model, "full")
    assert not adapters(model)


def test_a_full_layer_beside_lora() -> None:
    model = tiny_llama()
    inject(model, "lora", targets=["q_proj"])
    inject(model, "full", targets=[r".*norm", "lm_head"])
    F.cross_entropy(model(IDS, use_cache=False).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    assert {type(adapter).name for adapter in adapters(model).values()} == {"lora", "full"}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained_parameters(model).keys()
