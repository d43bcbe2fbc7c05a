"""From names to folders. No test touches the network."""

import json

import huggingface_hub
import pytest
from checkpoints import random_tensors, tiny_hub_config, write_folder

from stepjax.checkpoint import hub
from stepjax.checkpoint.reader import Checkpoint
from stepjax.checkpoint.weight_files import inside
from stepjax.config import ASSETS
from stepjax.errors import CheckpointError, ConfigError


class Hub:
    """A hub with one model; remembers what was asked of it."""

    def __init__(self, root):
        self.folder = root / "models--org--name" / "snapshots" / "c0ffee"
        self.calls = []

    def snapshot_download(self, repo, *, revision=None, allow_patterns=(), tqdm_class=None):
        self.calls.append((repo, revision, tuple(allow_patterns)))
        self.bar = tqdm_class
        return str(self.folder)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = Hub(tmp_path)
    config = tiny_hub_config()
    write_folder(fake.folder, config, random_tensors(config))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_a_folder_is_itself(tmp_path):
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_a_folder_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "step-tiny").mkdir()
    assert hub.resolve("step-tiny").resolve() == tmp_path / "step-tiny"


def test_embedded_names_are_folders_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "ASSETS", tmp_path / "assets")
    config = tiny_hub_config()
    folder = write_folder(tmp_path / "assets" / "step-tiny", config, random_tensors(config))
    assert hub.resolve("step-tiny") == folder
    with pytest.raises(CheckpointError, match="install the package again"):
        hub.resolve("step-tiny-student")


def test_the_embedded_release_is_a_configuration_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("step-3.5-flash", weights=False) == ASSETS / "step-3.5-flash"
    with pytest.raises(CheckpointError, match=r"stepfun-ai/Step-3\.5-Flash"):
        hub.resolve("step-3.5-flash")


@pytest.mark.parametrize(("name", "revision"), [("org/name", None), ("org/name@v1.0", "v1.0")])
def test_a_hub_id_is_downloaded_after_its_configuration(fake, name, revision):
    folder = hub.resolve(name)
    assert Checkpoint(folder).has_mtp
    small, whole = fake.calls
    assert small == ("org/name", revision, ("*.json", "*.jinja", "*.txt"))
    assert whole == ("org/name", "c0ffee", ("*.json", "*.jinja", "*.txt", "*.safetensors"))


def test_the_configuration_alone_downloads_no_weights(fake):
    hub.resolve("org/name", weights=False)
    assert [patterns for _, _, patterns in fake.calls] == [("*.json", "*.jinja", "*.txt")]


def test_another_model_is_refused_before_its_weights(fake):
    (fake.folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="llama"):
        hub.resolve("org/name")
    assert len(fake.calls) == 1


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("model.gguf", "model.gguf"),
        ("Q4_K_S/step-00001-of-00002.gguf", "Q4_K_S/step-*-of-00002.gguf"),
    ],
)
def test_a_gguf_file_of_a_repository_is_downloaded_with_its_parts(fake, file, pattern):
    target = fake.folder / file
    target.parent.mkdir(exist_ok=True)
    blob = fake.folder.parent.parent / "blobs" / "abc"
    blob.parent.mkdir()
    blob.write_bytes(b"GGUF")
    target.symlink_to(blob)
    assert hub.resolve(f"org/name/{file}@v1") == target
    assert fake.calls == [("org/name", "v1", (pattern,))]
    assert inside(target.parent, target.name) == target


def test_a_repository_with_gguf_files_only_names_them(fake, monkeypatch):
    (fake.folder / "config.json").unlink()
    names = ["b-00001-of-00002.gguf", "b-00002-of-00002.gguf", "a.gguf", "mmproj-a.gguf", "README.md"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, revision=None: names)
    with pytest.raises(
        CheckpointError, match=r"2 GGUF files of models: a.gguf, b-00001-of-00002.gguf; .* org/name/a.gguf"
    ):
        hub.resolve("org/name")
    with pytest.raises(CheckpointError, match=r"org/name: has no file c.gguf; it has a.gguf, b-00001-of-00002.gguf"):
        hub.resolve("org/name/c.gguf")


def test_the_bar_is_silent_without_a_terminal(fake):
    hub.resolve("org/name", weights=False)
    bar = fake.bar(total=3, desc="file", disable=False)
    assert bar.disable
    bar.close()


@pytest.mark.parametrize(
    "error",
    [OSError("no route to host"), RuntimeError("gated\nsecond line"), ValueError("")],
    ids=lambda e: type(e).__name__,
)
def test_a_failed_download_says_what_to_try(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"org/name@main: could not be had .* HF_TOKEN") as found:
        hub.resolve("org/name@main")
    assert "second line" not in str(found.value)
    assert type(error).__name__ in str(found.value)


def test_offline_without_a_cached_copy(tmp_path, monkeypatch):
    """The real client, kept from the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        hub.resolve("org/name")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "no-such-model",
        "missing.gguf",
        "folder/missing.gguf",
        "a/b/c",
        "./missing/folder",
        "org/name@",
        "https://x.y/z",
        "../up",
        "a\0b",
        "x" * 5000,
    ],
)
def test_anything_else_lists_the_forms(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="org/name@revision"):
        hub.resolve(name)


def test_a_file_is_not_a_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="expected a checkpoint folder"):
        hub.resolve(file)
