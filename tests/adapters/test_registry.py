"""Methods from outside the package: what a registration must say, which files are run, and where a method came from."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import subspace
from subspace.adapters import registry
from subspace.adapters.registry import (
    list_methods,
    load_method_file,
    method_origin,
    register,
    resolve_method,
    resolve_recorded_method,
)
from subspace.errors import UserError
from subspace.methods.lora import LoRA
from tests.helpers.tiny_models import tiny_llama

MY_METHOD = Path(__file__).parents[1] / "methods" / "my_method.py"
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(autouse=True)
def own_register(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Give each test a register, a list of files that were run and entry points of its own."""
    list_methods()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    monkeypatch.setattr(registry, "_files", {})
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    registry._import_entry_points.cache_clear()
    yield
    registry._import_entry_points.cache_clear()


def write_method(folder: Path, old: str = "", new: str = "", name: str = "my_method.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = MY_METHOD.read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new) if old else text)
    return folder / name


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, value: str = "vera_package.methods") -> None:
    """Put a distribution with a module and its entry point on the path, as pip would."""
    write_method(folder / "vera_package", name="methods.py")
    (folder / "vera_package" / "__init__.py").touch()
    about = folder / "vera_package-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vera-package\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text(f"[subspace.methods]\nvera = {value}\n")
    monkeypatch.syspath_prepend(str(folder))
    for module in ("vera_package", "vera_package.methods"):
        monkeypatch.delitem(sys.modules, module, raising=False)


def test_a_method_in_a_file_is_injected_merged_counted_and_loaded_again(tmp_path: Path) -> None:
    load_method_file(MY_METHOD)
    model = tiny_llama()
    for adapter in subspace.inject(model, "VeRA", {"r": 3}, targets=["q_proj"]).values():
        torch.nn.init.normal_(adapter.trained()["b"])
        assert sum(p.numel() for p in adapter.trained().values()) == 3 + 64
    expected = model(IDS).logits
    subspace.save_adapter(model, tmp_path / "adapter")
    subspace.merge(model)
    assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
    fresh = tiny_llama()
    assert subspace.match_budget("vera", fresh, 10 * (7 + 64) + 0, targets=["q_proj"]) > 1
    subspace.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(IDS).logits, expected)


def test_a_class_stands_for_its_name(tmp_path: Path) -> None:
    (cls,) = load_method_file(MY_METHOD).methods.values()
    adapters = subspace.inject(tiny_llama(), cls, {"r": 2}, targets=["q_proj"])
    assert {type(adapter) for adapter in adapters.values()} == {cls}
    assert resolve_method("vera-16")[1] == {"r": 16}


def test_a_file_is_run_once_whatever_its_path(tmp_path: Path) -> None:
    first = load_method_file(write_method(tmp_path / "a"))
    assert load_method_file(write_method(tmp_path / "b", name="other.py")) is first


def test_two_versions_of_a_method_are_each_found_by_their_file(tmp_path: Path) -> None:
    old = load_method_file(write_method(tmp_path))
    new = load_method_file(write_method(tmp_path, "setting(4,", "setting(6,"))
    assert resolve_method("vera", old)[0].Config().r == 4  # type: ignore[attr-defined]
    assert resolve_method("vera", new)[0].Config().r == 6  # type: ignore[attr-defined]
    assert resolve_method("vera")[0] is new.methods["vera"]
    assert resolve_method("", old)[0] is old.methods["vera"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"extension"', '"extensoin"', "line 19: .*family is 'extensoin'. Did you mean 'extension'"),
        (', num_params="r + n_out"', "", "line 19: TypeError: .*num_params"),
        ('"r + n_out"', '"r + out"', "num_params names 'out'. Did you mean 'n_out'"),
        ('"r + n_out"', '"r +"', "num_params is 'r \\+', but is the number of trained values"),
        ('"scale"}', '"scales"}', "the role of b is 'scales'. Did you mean 'scale'"),
        ('    roles: ClassVar = {"d": "core", "b": "scale"}\n', "", "does not say which tensors it trains"),
        ('size_setting = "r"', 'site = "liner"', "its site is 'liner'. Did you mean 'linear'"),
        ("LinearAdapter)", "nn.Module)", "derives from no adapter"),
        ("Config(MethodConfig)", "Config", "Config is not a MethodConfig"),
        ("    @dataclass(frozen=True, kw_only=True)\n", "", "'r' is no setting. Write `@dataclass"),
        ("        r: int =", "        targets: int =", "a setting is called 'targets'"),
        ('"vera",', '"lora",', "'lora' of the file .*my_method.py cannot .*: it is that of subspace itself"),
        ('"vera-16"', '"rslora"', "'rslora' of the file .* cannot have this name"),
        ('"vera",', '"My Method",', "cannot be called 'My Method'"),
        ("class VeRA(", "class VeRA[", "line 20: "),
        ("from torch import Tensor, nn", "from torch import Tensor, nn, nonsense", "line 12: ImportError"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_method_is_refused_and_leaves_nothing(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    before, modules = list_methods(), set(sys.modules)
    with pytest.raises(UserError, match=message):
        load_method_file(write_method(tmp_path, old, new))
    assert list_methods() == before
    assert not [name for name in set(sys.modules) - modules if name.startswith("subspace_method_file")]


def test_a_file_that_registers_nothing_or_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.py").touch()
    with pytest.raises(UserError, match=r"empty.py' cannot be used: it registers no method"):
        load_method_file(tmp_path / "empty.py")
    with pytest.raises(UserError, match=r"none.py' cannot be read: No such file"):
        load_method_file(tmp_path / "none.py")


def test_a_method_of_the_running_program_may_be_registered_again() -> None:
    for _ in range(2):  # a notebook's cell

        @register("mine", family="extension", num_params="r")
        class Mine(LoRA):
            pass

    assert list_methods()["mine"] is Mine
    assert method_origin(Mine) == {"module": __name__}


def test_the_file_of_a_run_is_run_only_where_its_source_was_run_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = write_method(tmp_path / "run" / "method")
    with pytest.raises(UserError, match=f"code that you have not run before.*name it: method.file={copy}"):
        load_method_file(copy, trusted=False)
    assert not registry._files
    load_method_file(MY_METHOD)  # named by the user
    monkeypatch.setattr(registry, "_files", {})  # as in a later process
    assert load_method_file(copy, trusted=False).methods
    monkeypatch.setattr(registry, "_files", {})
    copy.write_text(copy.read_text() + "\n# changed\n")
    with pytest.raises(UserError, match="code that you have not run before"):
        load_method_file(copy, trusted=False)


def test_an_adapter_file_never_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_method(tmp_path / "there")
    load_method_file(source)
    model = tiny_llama()
    subspace.inject(model, "vera", targets=["q_proj"])
    subspace.save_adapter(model, tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter" / "adapter.json").read_text())["adapters"][0]["origin"]
    assert told == {"file": "my_method.py", "sha256": next(iter(registry._files))}

    monkeypatch.setattr(registry, "_files", {})
    monkeypatch.setattr(registry, "_methods", {k: v for k, v in registry._methods.items() if k != "vera"})
    monkeypatch.chdir(source.parent)
    with pytest.raises(UserError, match=r"no method is called 'vera' here.*file my_method.py \(SHA-256 .*method.file="):
        subspace.load_adapter(tiny_llama(), tmp_path / "adapter")
    assert not registry._files


def test_another_source_of_a_method_is_taken_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    origin = method_origin(load_method_file(write_method(tmp_path)).methods["vera"])
    registry._files.clear()
    new = load_method_file(write_method(tmp_path, "0.1", "0.2"))
    with caplog.at_level(logging.WARNING, "subspace"):
        assert resolve_recorded_method("vera", origin) is new.methods["vera"]
    assert f"trained as the file my_method.py (SHA-256 {origin['sha256'][:12]})" in caplog.text


def test_the_packages_own_methods_have_no_origin() -> None:
    assert method_origin(LoRA) == {}
    assert resolve_recorded_method("lora", {}) is LoRA


def test_an_installed_package_offers_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    model = tiny_llama()
    subspace.inject(model, "vera", targets=["q_proj"])
    subspace.save_adapter(model, tmp_path / "adapter")
    expected = model(IDS).logits
    fresh = tiny_llama()
    described = subspace.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(IDS).logits, expected)
    origin = {"entry_point": "vera_package.methods", "distribution": "vera-package", "version": "1.2"}
    assert described["adapters"][0]["origin"] == origin

    monkeypatch.setattr(registry, "_methods", {k: v for k, v in registry._methods.items() if k != "vera"})
    with pytest.raises(UserError, match="package vera-package 1.2: install it: pip install vera-package==1.2"):
        resolve_recorded_method("vera", origin)


def test_a_package_that_cannot_be_imported_keeps_nobody_from_the_other_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(tmp_path, monkeypatch, "vera_package.nonsense")
    assert resolve_method("lora")[0] is LoRA
    assert "vera of vera-package 1.2 cannot be imported: ModuleNotFoundError" in caplog.text
    with pytest.raises(UserError, match="no method is called 'vera'.*vera of vera-package 1.2 cannot be imported"):
        resolve_method("vera")
