"""A run's configuration: what the file and the command line say arrives typed, and what cannot be meant is refused."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from subspace import config as config_module
from subspace.adapters.inject import inject
from subspace.adapters.registry import list_methods, resolve_method
from subspace.adapters.serialization import save_adapter
from subspace.cli.command import settings_manual
from subspace.common.paths import REPOSITORY
from subspace.common.settings import SettingInfo
from subspace.errors import UserError
from subspace.resolve import with_current_names
from subspace.training.resume import changed_settings, check_resumable
from tests.helpers.tiny_models import tiny_llama

RECIPES = REPOSITORY / "launch" / "recipes"
EXAMPLE = """
model:  {path: smollm2-135m, dtype: bfloat16, quantize: nf4}
method: {name: dora, r: 8, alpha: 64}
targets: [q_proj, k_proj]
data:   {mixture: commonsense, max_length: 128, loss_on: answer}
train:  {epochs: 3, batch_size: 8, learning_rate: 2e-4, warmup_steps: 7, seed: 3}
engine: ds_configs/zero2.json
evaluate: {protocol: likelihood, tasks: [boolq]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "example.yaml"
    path.write_text(EXAMPLE)
    return path


def values(key: SettingInfo) -> Any:
    """Return a value that a setting may have and that is not its default."""
    if key.name == "published":
        return {"source": "a paper", "boolq": 70.5}
    if key.name == "columns":
        return {"instruction": "question"}
    if key.name == "date":
        return "2024-02-29"
    word = next((choice for choice in key.choices if choice not in (key.default, *(key.default or []))), "other")
    changed = {bool: not key.default, int: 3, float: 0.75, str: word, list: [word], dict: {"anywhere": {}}}
    kinds = [typing.get_origin(kind) or kind for kind in key.types]
    return changed[list if list in kinds else kinds[0]]


def part(name: str, **settings: Any) -> config_module.MethodEntry:
    method, presets = resolve_method(name)
    own = {field.name for field in dataclasses.fields(method.Config)}
    config_of = method.Config(**presets, **{key: value for key, value in settings.items() if key in own})
    return config_module.MethodEntry(
        name=method.name, settings=config_of, **{key: value for key, value in settings.items() if key not in own}
    )


def test_the_file_arrives_typed(file: Path) -> None:
    run = config_module.read_config(file)
    assert run.model.quantize == "nf4"
    assert run.method == (part("dora", r=8, alpha=64.0, targets=["q_proj", "k_proj"]),)
    assert run.methods == "dora"
    assert (run.train.learning_rate, run.train.batch_size) == (2e-4, 8)
    assert run.evaluate.tasks == ["boolq"]
    assert run.name == "example"
    assert run.folder == Path("runs/example")
    assert Path(run.engine) == REPOSITORY / "ds_configs" / "zero2.json"


def test_what_is_written_is_read_again(file: Path, tmp_path: Path) -> None:
    run = config_module.read_config(file, ["train.steps=5", "targets=null", "data.limit=9"])
    written = tmp_path / "runs" / "example" / "config.yaml"
    config_module.write_config(run, written)
    assert config_module.read_config(written) == run
    assert str(REPOSITORY) not in written.read_text()


@pytest.mark.parametrize("method", list_methods())
def test_every_setting_arrives_from_file_and_command_line(method: str, tmp_path: Path) -> None:
    known = {
        name: key
        for name, key in config_module.all_settings({"method": list_methods()[method]}).items()
        # those of a file of the user's own, and what no file may say
        if name not in ("method.name", "method.file", "method.sha256", "model.trust_remote_code")
    }
    given = {name: values(key) for name, key in known.items()}
    nested: dict[str, Any] = {"method": {"name": method}}
    for name, value in given.items():
        section, _, key = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[key] = value
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(nested))
    (tmp_path / "none.yaml").write_text("model:\n")

    from_file = config_module.read_config(tmp_path / "all.yaml")
    overrides = [f"{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in given.items()]
    assert config_module.read_config(tmp_path / "none.yaml", [f"method={method}", *overrides]) == from_file

    plain = from_file.as_dict()
    for name, value in given.items():
        section, _, key = name.rpartition(".")
        assert (plain[section] if section else plain)[key] == value


def test_overrides_win_and_take_yaml(file: Path) -> None:
    run = config_module.read_config(
        file, ["targets=v_proj,o_proj", "train.learning_rate=1e-3", "train.steps=null", "name=other"]
    )
    assert run.method[0].targets == ["v_proj", "o_proj"]
    assert (run.train.learning_rate, run.train.steps, run.name) == (1e-3, None, "other")
    assert config_module.read_config(file, ["targets=[v_proj]"]).method[0].targets == ["v_proj"]


def test_another_method_leaves_the_old_ones_settings(file: Path) -> None:
    assert config_module.read_config(file, ["method=ssl"]).method == (part("ssl", targets=["q_proj", "k_proj"]),)
    with pytest.raises(UserError, match=r"sets 'method\.r', but method ssl has no setting 'r'"):
        config_module.read_config(file, ["method.name=ssl"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("method=rslora", part("lora", rslora=True)),
        ("method=LoRA+MPC_o", part("lora", constraint="orthogonal")),
        ("method=TriLoRA+mpc-d", part("trilora", constraint="diagonal")),
        ("method=p-tuning-v2", part("prefix")),
    ],
)
def test_an_alias_is_written_out(file: Path, override: str, expected: config_module.MethodEntry) -> None:
    run = config_module.read_config(file, [override])
    assert run.method == (dataclasses.replace(expected, targets=["q_proj", "k_proj"]),)


def test_what_stands_beside_an_alias_counts_more(file: Path) -> None:
    file.write_text("method: {name: rslora, r: 4, rslora: false}\n")
    assert config_module.read_config(file).method == (part("lora", r=4),)
    assert config_module.read_config(file, ["method.name=lora+mpc-o"]).method == (
        part("lora", r=4, constraint="orthogonal"),
    )
    assert config_module.read_config(file, ["method.name=rslora"]).method == (part("lora", r=4, rslora=True),)


SEVERAL = """
model: {path: smollm2-135m}
method:
- {name: lora+mpc-o, r: 8, targets: [q_proj, v_proj], patterns: {'layers\\.0\\..*': {r: 4, alpha: 8}}}
- name: ssl
  targets: [up_proj]
- houlsby
"""
LORA = part("lora+mpc-o", r=8, targets=["q_proj", "v_proj"], patterns={r"layers\.0\..*": {"r": 4, "alpha": 8.0}})


def test_several_methods_in_one_run(file: Path, tmp_path: Path) -> None:
    file.write_text(SEVERAL)
    run = config_module.read_config(file)
    assert run.method == (LORA, part("ssl", targets=["up_proj"]), part("houlsby"))
    assert run.methods == "lora, ssl, houlsby"
    config_module.write_config(run, tmp_path / "config.yaml")
    assert config_module.read_config(tmp_path / "config.yaml", ["name=example"]) == run


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method.0.r=16"], (dataclasses.replace(LORA, settings=part("lora+mpc-o", r=16).settings), "ssl", "houlsby")),
        (["method.1=ssb"], (LORA, part("ssb", targets=["up_proj"]), "houlsby")),
        (["method.2=rslora", "method.2.r=3", "method.2.targets=k_proj"],
         (LORA, "ssl", part("rslora", r=3, targets=["k_proj"]))),
        (["method=dora", "method.r=3", "targets=k_proj"], (part("dora", r=3, targets=["k_proj"]),)),
    ],
)  # fmt: skip
def test_several_methods_are_overridden_by_number(file: Path, overrides: list[str], expected: Any) -> None:
    file.write_text(SEVERAL)
    given = {"ssl": part("ssl", targets=["up_proj"]), "houlsby": part("houlsby")}
    assert config_module.read_config(file, overrides).method == tuple(
        given.get(p, p) if isinstance(p, str) else p for p in expected
    )


def test_each_part_gets_its_sites_and_patterns(file: Path) -> None:
    """The parts go into a model one after the other, as run.py puts them there."""
    file.write_text(SEVERAL)
    model = tiny_llama()
    ranks: dict[str, int] = {}
    for p in config_module.read_config(file).method:
        for site, adapter in inject(model, p.name, p.settings, targets=p.targets, patterns=p.patterns).items():
            ranks[site] = getattr(adapter.config, "r", 0)
    assert ranks["model.layers.0.self_attn.q_proj"] == 4
    assert ranks["model.layers.1.self_attn.q_proj"] == 8
    assert ranks["model.layers.0.mlp.up_proj"] == 0
    assert len(ranks) == 2 * (2 + 1 + 2)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("method.r=8", r"sets 'method\.r', .* Did you mean 'method\.0\.r'\?"),
        ("targets=[q_proj]", r"sets 'targets', .* Did you mean 'method\.0\.targets'\?"),
        ("method.3.r=8", r"needs its name, and method\.3 has none"),
        ("method.1.r=8", r"method ssl has no setting 'r'"),
        ("method.1=lroa", r"Did you mean 'lora'\?"),
        ("method.0.r=0", r"sets method\.0\.r to 0, but it must lie in"),
        (
            "method.0.patterns={a: {rank: 4}}",
            r"patterns, for 'a', sets 'method\.0\.rank', but method lora has no",
        ),
        ("method.0.patterns={a: {r: 0}}", r"sets method\.0\.r to 0, but it must lie in"),
        ("method.0.patterns={a: {r: x}}", r"for 'a', sets method\.0\.r to 'x', but it takes a whole number"),
        ("method.0.patterns={a: 4}", r"it takes a mapping: settings by layer name"),
    ],
)
def test_what_several_methods_cannot_mean_is_refused(file: Path, override: str, complaint: str) -> None:
    file.write_text(SEVERAL)
    with pytest.raises(UserError, match=complaint):
        config_module.read_config(file, [override])


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("train.step=4", r"sets 'train\.step', but train has no setting 'step'. Did you mean 'steps'\?"),
        ("steps=4", r"no such setting\. Did you mean 'train\.steps'\?"),
        ("trian.lr=4", r"no such setting\. Here it is train\.learning_rate"),
        ("trian.rows=4", r"no such setting\. Did you mean 'train'\?"),
        ("train=4", r"train is a section"),
        ("train.steps", r"of the form key=value"),
        ("train.steps=many", r"train\.steps to 'many', but it takes a whole number or null: optimizer steps"),
        ("train.steps=0", r"^the command line sets train\.steps to 0, but it must lie in \[1, 1,000,000,000\]"),
        ("train.schedule=liner", r"^the command line sets train\.schedule to 'liner'.*Did you mean 'linear'\?"),
        ("method=lroa", r"no method is called 'lroa'\. Did you mean 'lora'\?"),
        ("method.rank=4", r"method dora has no setting 'rank'"),
        ("method.r=0", r"sets method\.r to 0, but it must lie in \[1, 65,536\]"),
        ("name=a/b", r"name is 'a/b'"),
    ],
)
def test_what_cannot_be_meant_is_refused(file: Path, override: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        config_module.read_config(file, [override])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("train:\n  steps: 1\n  steps: 2\n", r"line 3 .*'steps' stands here twice"),
        ("train: [1\n", r"line 2 .*expected"),
        ("train: 5\n", r"train is 5, but is a section"),
        ("just words\n", r"should be a mapping: lines 'key: value'"),
        ("", r"should be a mapping: lines 'key: value'"),
        ("train: {steps: 2.5}\n", r"example\.yaml sets train\.steps to 2\.5, but it takes a whole number or null"),
        ("train: {learning_rate: true}\n", r"it takes a number"),
        ("model: {path: 12}\n", r"it takes text"),
        ("targets: {a: b}\n", r"it takes a list or null"),
        ("method: []\n", r"method is an empty list"),
        ("method: [lora, 5]\n", r"method\.1 is 5, but is a section"),
        ("method: [{r: 5}]\n", r"each of several methods needs its name, and method\.0 has none"),
        ("method: [lora]\ntargets: [q_proj]\n", r"Did you mean 'method\.0\.targets'\?"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(file: Path, text: str, complaint: str) -> None:
    file.write_text(text)
    with pytest.raises(UserError, match=complaint):
        config_module.read_config(file)


def test_a_missing_file_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no configuration file .*Did you mean 'launch/recipes/quickstart\.yaml'\?"):
        config_module.read_config("launch/recipes/quickstrat.yaml")


def test_the_engine_is_found_beside_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "own.json").write_text("{}")
    assert config_module.read_config(file, ["engine=own.json"]).engine == str(file.parent / "own.json")


@pytest.mark.parametrize(
    "recipe", sorted((REPOSITORY / "launch" / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_recipe_is_good(recipe: Path) -> None:
    assert Path(config_module.read_config(recipe).engine).is_file()


@pytest.mark.parametrize("method", list_methods())
def test_no_setting_of_a_method_has_a_name_that_is_taken(method: str) -> None:
    taken = {*(f.name for f in dataclasses.fields(config_module.MethodEntry)), "model", "method", "parameters"}
    assert not taken & {f.name for f in dataclasses.fields(list_methods()[method].Config)}


def test_every_setting_is_explained() -> None:
    told = settings_manual()
    assert not [
        name for name, key in config_module.all_settings({"method": list_methods()["lora"]}).items() if not key.doc
    ]
    assert all(f"  {name}=" in told for name in config_module.all_settings({"method": list_methods()["ssl"]}))
    assert all(f.name in told for method in list_methods().values() for f in dataclasses.fields(method.Config))


def test_what_is_scored_is_a_run_a_configuration_or_a_model(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = config_module.read_config(file)
    config_module.write_config(run, run.folder / "config.yaml")
    with pytest.raises(UserError, match="has no adapter"):
        config_module.read_subject("runs/example")
    model = tiny_llama()
    inject(model, "lora", {"r": 2}, targets=["q_proj"])
    save_adapter(model, run.folder / "adapter")
    trained = config_module.read_subject("runs/example", ["evaluate.limit=5"])
    assert (trained.folder, trained.adapter) == (run.folder, run.folder / "adapter")
    assert (trained.model, trained.evaluate.limit) == (run.model, 5)

    base = config_module.read_subject(str(file))
    assert (base.folder, base.adapter, base.model) == (Path("runs/smollm2-135m"), None, run.model)
    assert config_module.read_subject("some/model").folder == Path("runs/some-model")
    with pytest.raises(UserError, match="Did you mean 'runs/example'"):
        config_module.read_subject("runs/exmple")


# A configuration that builds on another.


@pytest.fixture
def child(file: Path) -> Path:
    path = file.with_name("child.yaml")
    path.write_text("base: example.yaml\ntrain: {learning_rate: 1e-3}\nmethod: {r: 4}\n")
    return path


def test_a_file_builds_on_another(file: Path, child: Path) -> None:
    below, run = config_module.read_config(file), config_module.read_config(child)
    assert run.name == "child"
    assert run.method == (part("dora", r=4, alpha=64.0, targets=["q_proj", "k_proj"]),)
    assert run.train == dataclasses.replace(below.train, learning_rate=1e-3)
    assert (run.model, run.data, run.evaluate, run.engine) == (below.model, below.data, below.evaluate, below.engine)


def test_a_file_that_names_its_method_takes_nothing_from_the_other_s(child: Path) -> None:
    child.write_text("base: example.yaml\nmethod: {name: dora, r: 4}\n")
    assert config_module.read_config(child).method == (part("dora", r=4, targets=["q_proj", "k_proj"]),)
    child.write_text("base: example.yaml\nmethod: [ssl, {name: lora, targets: [v_proj]}]\n")
    assert config_module.read_config(child).method == (part("ssl"), part("lora", targets=["v_proj"]))


def test_a_message_names_the_file_that_sets_a_value(file: Path, child: Path) -> None:
    file.write_text(EXAMPLE.replace("epochs: 3", "epochs: many"))
    with pytest.raises(UserError, match=r"example\.yaml sets train\.epochs to 'many'"):
        config_module.read_config(child)
    child.write_text("base: example.yaml\ntrain: {epochs: few}\n")
    with pytest.raises(UserError, match=r"child\.yaml sets train\.epochs to 'few'"):
        config_module.read_config(child)
    assert config_module.read_config(child, ["train.epochs=2"]).train.epochs == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("base: child.yaml\n", r"child\.yaml builds on itself"),
        ("base: other.yaml\n", r"no configuration file .*other\.yaml"),
        ("base: [example.yaml]\n", r"child\.yaml sets base to \['example\.yaml'\], but it takes the path"),
    ],
)
def test_a_base_that_cannot_be_meant_is_refused(child: Path, text: str, complaint: str) -> None:
    child.write_text(text)
    with pytest.raises(UserError, match=complaint):
        config_module.read_config(child)


def test_what_is_given_is_one_file_s_content(file: Path, child: Path) -> None:
    alone = file.with_name("alone.yaml")
    alone.write_text(yaml.safe_dump(config_module.read_given(child)))
    assert config_module.read_config(alone, ["name=child"]) == config_module.read_config(child)


def test_published_scores_are_typed(file: Path) -> None:
    file.write_text("published: {boolq: 69.7, average: 70, source: a paper}\n")
    run = config_module.read_config(file)
    assert run.published == {"boolq": 69.7, "average": 70.0, "source": "a paper"}
    assert run.as_dict()["published"] == run.published
    for wrong in ("{boolq: high, source: a paper}", "{boolq: 69.7}"):
        file.write_text(f"published: {wrong}\n")
        with pytest.raises(UserError, match="sets published to .*, but it takes a section or null: published scores"):
            config_module.read_config(file)


def test_targets_may_stand_in_the_method_s_section(file: Path) -> None:
    file.write_text("method: {name: lora, targets: [q_proj]}\n")
    assert config_module.read_config(file).method == (part("lora", targets=["q_proj"]),)


def test_text_that_looks_like_a_number_is_text_on_the_command_line(file: Path) -> None:
    run = config_module.read_config(file, ["name=007", "model.path=12", "evaluate.tasks=[a, b]", "data.limit=null"])
    assert (run.name, run.model.path, run.evaluate.tasks, run.data.limit) == ("007", "12", ["a", "b"], None)


# Names that settings had before.

OLD = """
name: old
model: {path: smollm2-135m}
method: {name: lora, r: 8, mpc: o, mpc_weight: 0.5, mpc_reduce: mean, mpc_squared: false}
targets: [q_proj]
train: {batch: 8, micro_batch: 2, clip: 0.5, keep: best, lora_plus: 4.0}
evaluate:
  {protocol: 'likelihood,answer-word', tasks: boolq, seen: score, again: true, mixed: true, defects: unequal_prompts}
"""
NEW = """
name: old
model: {path: smollm2-135m}
method:
  {name: lora, r: 8, constraint: orthogonal, constraint_weight: 0.5, constraint_reduce: mean, constraint_squared: false}
targets: [q_proj]
train: {batch_size: 8, micro_batch_size: 2, max_grad_norm: 0.5, save_final: best, lora_plus_lr_ratio: 4.0}
evaluate:
  protocol: [likelihood, answer-word]
  tasks: [boolq]
  on_contamination: warn
  overwrite: true
  batch_adapters: true
  defects: [unequal_prompts]
"""


def test_an_old_configuration_is_read_with_one_notice_that_names_the_file_and_all_renames(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_text(NEW)
    new = config_module.read_config(file)
    assert not caplog.messages
    file.write_text(OLD)
    assert config_module.read_config(file) == new
    (notice,) = caplog.messages
    assert notice.startswith(f"{file} uses old setting names: ")
    assert notice.count(" is now ") == 4 + 5 + 3
    assert "train.batch is now train.batch_size" in notice


def test_an_old_name_on_the_command_line_wins_over_the_file(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert config_module.read_config(file, ["train.batch=4"]).train.batch_size == 4
    assert config_module.read_config(file, ["evaluate.seen=score"]).evaluate.on_contamination == "warn"
    assert caplog.messages[0].startswith(
        "the command line uses old setting names: train.batch is now train.batch_size."
    )
    file.write_text(OLD)
    assert config_module.read_config(file, ["train.batch_size=4"]).train.batch_size == 4


def test_an_old_adapter_file_s_settings_are_read() -> None:
    """As adapter.json of an earlier version has them."""
    created = inject(tiny_llama(), "lora", {"r": 4, "alpha": 8.0, "mpc": "n", "mpc_weight": 0.0}, targets=["q_proj"])
    assert {adapter.config.constraint for adapter in created.values()} == {"nonlinear"}
    assert not any(adapter.mergeable for adapter in created.values())


def test_an_old_checkpoint_s_configuration_is_compared_under_the_present_names(file: Path) -> None:
    file.write_text(NEW)
    run = config_module.read_config(file)
    old = yaml.safe_load(OLD)
    stored = {**run.as_dict(), **{name: old[name] for name in ("method", "train", "evaluate")}}
    stored["method"] = {**run.as_dict()["method"], **old["method"]}
    for name in ("constraint", "constraint_weight", "constraint_reduce", "constraint_squared"):
        del stored["method"][name]
    new_names = ("batch_size", "micro_batch_size", "max_grad_norm", "save_final", "lora_plus_lr_ratio")
    stored["train"] |= {key: value for key, value in run.as_dict()["train"].items() if key not in new_names}
    later = ("date", "too_long", "bad_rows")  # settings since
    stored["data"] = {key: value for key, value in run.as_dict()["data"].items() if key not in later}
    assert stored["data"]["loss_on"] == "answers"
    stored["data"]["loss_on"] = "answer"
    facts = {"config": with_current_names(stored), "engine": {}, "ranks": 1}
    check_resumable(Path("runs/old"), facts, run.as_dict())
    assert changed_settings(facts, run.as_dict(), {}, 1) == []
    other = dataclasses.replace(run, train=dataclasses.replace(run.train, max_grad_norm=1.0))
    assert changed_settings(facts, other.as_dict(), {}, 1) == ["train.max_grad_norm: 0.5 -> 1.0"]
