"""Models of the hub, in the revision that was asked for: against a hub on this machine, online and offline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from subspace import config as config_module
from subspace.adapters.inject import inject
from subspace.adapters.serialization import SETTINGS, load_adapter, save_adapter
from subspace.common.download import hub_model_here
from subspace.common.progress import no_progress
from subspace.errors import UserError
from subspace.models.config import ModelConfig
from subspace.models.inspection import settle
from subspace.models.loading import open_model, open_tokenizer
from subspace.models.prepare import find_files, prepare_model
from tests.helpers.hub import Hub, serving
from tests.helpers.tiny_models import tiny_llama

REPO = "toys/tiny"
IDS = torch.tensor([[5, 9, 33, 7]])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Serve a model with two commits: the first has a tag, the second is the main branch."""
    folder = tmp_path_factory.mktemp("hub")
    with serving() as hub:
        for seed, ref in ((1, "v1.0"), (2, "main")):
            tiny_llama(folder / ref, seed=seed)
            (folder / ref / "README.md").write_text("a card, which is not downloaded")
            hub.commit(REPO, folder / ref, ref)
        yield hub


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    server.use(monkeypatch, tmp_path / "hub-cache")
    return server


def prepare(name: str) -> str:
    return prepare_model(name, no_progress, every_file=False).folder


def weight(path: str, revision: str | None = None) -> torch.Tensor:
    model = open_model(ModelConfig(path=path, revision=revision, dtype="float32"))
    return model.get_parameter("model.embed_tokens.weight")


def of_seed(seed: int) -> torch.Tensor:
    return tiny_llama(seed=seed).get_parameter("model.embed_tokens.weight")


def test_a_prepared_model_is_found_offline_by_its_name(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(REPO)
    hub.set_offline(monkeypatch, offline=True)
    hub.asked.clear()
    assert torch.equal(weight(REPO), of_seed(2))
    open_tokenizer(ModelConfig(path=REPO))
    assert not hub.asked


@pytest.mark.parametrize("by", ["tag", "commit", "first digits"])
def test_every_verb_takes_a_revision_in_either_form(hub: Hub, by: str) -> None:
    sha = hub.refs[REPO]["v1.0"]
    revision = {"tag": "v1.0", "commit": sha, "first digits": sha[:9]}[by]
    prepare(f"{REPO}@{sha if by == 'first digits' else revision}")
    prepare(REPO)
    for path, given in ((f"{REPO}@{revision}", None), (REPO, revision)):
        assert torch.equal(weight(path, given), of_seed(1))
        settled = settle(ModelConfig(path=path, revision=given))
        assert (settled.path, settled.revision) == (REPO, sha)
        assert settle(settled) == settled
    assert settle(ModelConfig(path=REPO)).revision == hub.refs[REPO]["main"]
    subject = config_module.read_subject(f"{REPO}@{revision}")
    assert find_files(subject.model).commit == sha
    assert subject.folder.name == f"toys-tiny-{revision}"


def test_a_cache_with_a_tag_alone_says_what_it_has(hub: Hub) -> None:
    prepare(f"{REPO}@v1.0")
    sha = hub.refs[REPO]["v1.0"]
    with pytest.raises(UserError) as caught:
        weight(REPO)
    said = f"on this machine as v1.0 (commit {sha[:12]}), but its main branch is not"
    assert said in str(caught.value)
    assert f"subspace prepare --models {REPO}; or take model.revision={sha[:12]}" in str(caught.value)
    assert torch.equal(weight(REPO, sha[:12]), of_seed(1))


def test_a_revision_that_is_not_here_is_asked_for_by_its_name(hub: Hub) -> None:
    prepare(REPO)
    with pytest.raises(UserError, match=r"its revision 'v1.0' is not, or not whole.*--models toys/tiny@v1\.0"):
        weight(f"{REPO}@v1.0")
    with pytest.raises(UserError, match=r"has no branch, tag or commit 'v3'"):
        prepare(f"{REPO}@v3")
    with pytest.raises(UserError, match=r"has no model toys/other"):
        prepare("toys/other")


def test_what_cannot_be_a_revision_is_refused(hub: Hub, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "local")
    with pytest.raises(UserError, match=r"is a file or folder here, which has none"):
        find_files(ModelConfig(path=str(tmp_path / "local"), revision="v1.0"))
    with pytest.raises(UserError, match="names one revision and model.revision=v2 another"):
        find_files(ModelConfig(path=f"{REPO}@v1.0", revision="v2"))
    with pytest.raises(UserError, match="nothing after the @"):
        find_files(ModelConfig(path=f"{REPO}@"))
    with pytest.raises(UserError, match="comes from a package, in one revision"):
        find_files(ModelConfig(path="smollm2-135m", revision="main"))


def test_a_half_downloaded_revision_is_not_taken(hub: Hub) -> None:
    folder = Path(prepare(REPO))
    (folder / "model.safetensors").unlink()
    assert hub_model_here(REPO) is None
    with pytest.raises(UserError, match="not whole"):
        weight(REPO)
    prepare(REPO)
    assert torch.equal(weight(REPO), of_seed(2))


def test_an_adapter_records_the_commit_and_is_refused_on_another(hub: Hub, tmp_path: Path) -> None:
    prepare(f"{REPO}@v1.0")
    prepare(REPO)
    first, second = hub.refs[REPO]["v1.0"], hub.refs[REPO]["main"]
    model = open_model(ModelConfig(path=f"{REPO}@v1.0", dtype="float32"))
    inject(model, "lora")
    save_adapter(model, tmp_path / "adapter")
    recorded = json.loads((tmp_path / "adapter" / SETTINGS).read_text())["base"]
    assert (recorded["path"], recorded["commit"]) == (REPO, first)
    with pytest.raises(UserError) as caught:
        load_adapter(open_model(ModelConfig(path=REPO, dtype="float32")), tmp_path / "adapter")
    assert "its weights differ (SHA-256" in str(caught.value)
    assert f"at commit {second[:12]}" in str(caught.value)
    assert f"model.path={REPO} model.revision={first}" in str(caught.value)
    load_adapter(open_model(ModelConfig(path=REPO, revision=first[:8], dtype="float32")), tmp_path / "adapter")


def test_a_file_s_revision_goes_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("model: {path: toys/tiny, revision: v1.0}\nmethod: lora\n")
    (tmp_path / "above.yaml").write_text("base: below.yaml\nmodel: {path: toys/other}\n")
    read = config_module.read_config
    assert read(tmp_path / "below.yaml").model.revision == "v1.0"
    assert read(tmp_path / "above.yaml").model.revision is None
    assert read(tmp_path / "below.yaml", ["model.path=here"]).model.revision is None
    assert read(tmp_path / "below.yaml", ["model.revision=v2", "model.path=here"]).model.revision == "v2"
