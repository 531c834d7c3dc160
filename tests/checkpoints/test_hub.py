"""Models in the Hugging Face cache and on the Hub. The cache is a fake one; no test reaches for the
network."""

import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from miniflux import loading
from miniflux.checkpoints import finding, hub
from miniflux.checkpoints.hub import (
    OFFICIAL,
    WANTED,
    find_in_cache,
    find_network,
    find_or_download,
)

SCHNELL = OFFICIAL["schnell"]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def snapshot(
    cache: Path, repo: str, commit: str, *files: str, main: bool = True, age: int = 0
) -> Path:
    """A snapshot folder with these (empty) files, as huggingface_hub lays it out."""
    folder = cache / ("models--" + repo.replace("/", "--"))
    path = folder / "snapshots" / commit
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).touch()
    path.mkdir(parents=True, exist_ok=True)
    os.utime(path, (1e9 - age, 1e9 - age))
    if main:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
    return path


def download(monkeypatch, act, files: tuple[str, ...] = ()) -> list:
    """Puts a huggingface_hub in place whose snapshot_download is `act`, and whose repositories hold
    these files; returns the calls of snapshot_download."""
    calls = []

    class Hub:
        @staticmethod
        def snapshot_download(repo, **keywords):
            calls.append((repo, keywords))
            return act(repo)

        @staticmethod
        def list_repo_files(repo):
            return list(files)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    return calls


@pytest.fixture
def no_hub(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it raises ImportError


# ------------------------------------------------------------------------------------- in the cache


CASES = [
    {},
    {"HF_HUB_CACHE": "/a/hub", "HF_HOME": "/b"},
    {"HF_HOME": "/b"},
    {"XDG_CACHE_HOME": "/c"},
    {"HF_HUB_CACHE": "~/hub"},
    {"HF_HOME": "$HOME/hf"},
    {"HF_HUB_CACHE": "${HOME}/cache"},
    {"XDG_CACHE_HOME": "$HOME/x"},
    {"XDG_CACHE_HOME": "~/x"},
    {"HUGGINGFACE_HUB_CACHE": "/data/hub"},
    {"HUGGINGFACE_HUB_CACHE": "~/$USER/hub"},
    {"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/data"},
    {"HF_HUB_CACHE": "/a", "HUGGINGFACE_HUB_CACHE": "/b"},
    {"HF_HOME": "$NOWHERE/hf"},
    {"HF_HOME": ""},
    {"HF_HUB_CACHE": "relative"},
]
ASK = """
import importlib, json, os, sys
from huggingface_hub import constants
from miniflux.checkpoints.hub import cache_folder
clean = dict(os.environ)
for case in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update(clean | case)
    expected = importlib.reload(constants).HF_HUB_CACHE
    assert str(cache_folder()) == os.path.normpath(expected), (case, cache_folder(), expected)
"""


def test_the_cache_lies_where_the_hub_puts_it():
    """Oracle: the constants of huggingface_hub, read anew with each set of variables."""
    names = ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HUGGINGFACE_HUB_CACHE")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    subprocess.run([sys.executable, "-c", ASK, json.dumps(CASES)], check=True,
                   env=clean | {"HOME": "/home/me", "USER": "me"})


def test_a_model_is_found_through_its_main_branch(cache):
    path = snapshot(cache, SCHNELL, "aaa", "transformer/a.safetensors", age=100)
    snapshot(cache, SCHNELL, "bbb", "transformer/a.safetensors", main=False)
    assert (
        find_in_cache(SCHNELL)
        == find_or_download(SCHNELL)
        == finding.find_source("schnell")
        == finding.find_source(SCHNELL)
        == path
    )


def test_without_a_main_branch_the_newest_snapshot_is_taken(cache):
    snapshot(cache, SCHNELL, "ccc", "transformer/a.safetensors", main=False, age=100)
    path = snapshot(cache, SCHNELL, "aaa", "transformer/a.safetensors", main=False, age=1)
    snapshot(cache, SCHNELL, "bbb", "transformer/a.safetensors", main=False, age=50)
    assert find_in_cache(SCHNELL) == path


@pytest.mark.parametrize("main", ["", "\n", "gone"])
def test_a_main_branch_that_points_nowhere_is_passed_over(cache, main):
    path = snapshot(cache, SCHNELL, "aaa", "transformer/a.safetensors")
    (path.parents[1] / "refs" / "main").write_text(main)
    assert find_in_cache(SCHNELL) == path


def test_what_is_not_in_the_cache_is_not_found(cache):
    assert find_in_cache(SCHNELL) is None
    snapshot(cache, SCHNELL + "-2", "aaa", "transformer/a.safetensors")
    assert find_in_cache(SCHNELL) is None


def test_a_name_comes_before_a_folder_of_that_name(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schnell").mkdir()
    path = snapshot(cache, SCHNELL, "aaa", "transformer/a.safetensors")
    assert finding.find_source("schnell") == path
    assert (
        finding.find_source("./schnell") == finding.find_source(Path("schnell")) == Path("schnell")
    )


def test_a_folder_comes_before_a_repository_of_that_name(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / SCHNELL).mkdir(parents=True)
    snapshot(cache, SCHNELL, "aaa", "transformer/a.safetensors")
    assert finding.find_source(SCHNELL) == Path(SCHNELL)


def test_models_are_listed_with_where_they_are(cache):
    path = snapshot(cache, SCHNELL, "aaa", "model_index.json")
    lines = finding.list_models()
    assert any(str(path) in line and line.startswith("schnell") for line in lines)
    assert any(f"not in {cache}" in line and line.startswith("dev") for line in lines)


# ----------------------------------------------------------------------------------------- download


def test_a_missing_model_without_the_hub_says_what_to_do(cache, no_hub):
    with pytest.raises(FileNotFoundError) as caught:
        loading.load("schnell")
    assert str(caught.value) == (
        f'{SCHNELL} is not in {cache}: `pip install "miniflux-torch[hub]"` to download it, '
        "or give a folder that holds it"
    )


def test_an_incomplete_snapshot_is_said_so(cache, no_hub):
    path = snapshot(cache, SCHNELL, "aaa", "model_index.json", "tokenizer/vocab.json")
    (path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(
        ValueError,
        match="aaa is incomplete: it has a model_index.json, but not the folder transformer/",
    ):
        loading.load("schnell", device="cpu")


def test_a_missing_or_incomplete_model_is_downloaded_into_the_cache(cache, monkeypatch):
    calls = download(
        monkeypatch, lambda repo: str(snapshot(cache, repo, "bbb", "transformer/a.safetensors"))
    )
    expected = cache / f"models--{SCHNELL.replace('/', '--')}" / "snapshots" / "bbb"
    snapshot(cache, SCHNELL, "aaa", "ae.safetensors")  # what another program has left there
    assert find_or_download(SCHNELL) == expected
    assert calls == [(SCHNELL, {"allow_patterns": WANTED, "cache_dir": cache})]
    assert find_or_download(SCHNELL) == expected and len(calls) == 1


def pipeline(path: Path, **parts: str) -> Path:
    """A snapshot of a pipeline with these parts, each with one empty file."""
    index = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "image_encoder": [None, None],
        **{part: ["transformers", "Any"] for part in parts},
    }
    (path / "model_index.json").write_text(json.dumps(index))
    for part, file in ({"scheduler": "scheduler_config.json"} | parts).items():
        (path / part).mkdir(exist_ok=True)
        if file:
            (path / part / file).touch()
    return path


WHOLE = {
    "transformer": "a.safetensors",
    "vae": "a.safetensors",
    "text_encoder_2": "model.fp16.safetensors",
    "tokenizer": "tokenizer.json",
    "tokenizer_2": "spiece.model",
}


@pytest.mark.parametrize(
    "lacking", ["vae", "text_encoder_2", "tokenizer", "tokenizer_2", "a shard"]
)
def test_the_rest_of_an_interrupted_download_is_asked_for(cache, monkeypatch, lacking):
    path = pipeline(
        snapshot(cache, SCHNELL, "aaa"), **WHOLE | ({lacking: ""} if lacking in WHOLE else {})
    )
    if lacking == "a shard":
        index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
        (path / "transformer" / "a.safetensors.index.json").write_text(json.dumps(index))
    calls = download(monkeypatch, lambda repo: str(path))
    assert find_or_download(SCHNELL) == path and len(calls) == 1


def test_a_whole_snapshot_is_used_without_asking(cache, monkeypatch):
    path = pipeline(snapshot(cache, SCHNELL, "aaa"), **WHOLE)
    calls = download(monkeypatch, lambda repo: str(path))
    assert find_or_download(SCHNELL) == path and not calls


def test_without_the_network_an_incomplete_snapshot_is_used_with_a_warning(
    cache, monkeypatch, caplog
):
    """Whoever has encoded prompts needs no text encoder."""
    path = pipeline(snapshot(cache, SCHNELL, "aaa"), **WHOLE | {"text_encoder_2": ""})

    def fail(_):
        raise ConnectionError("no route to host")

    download(monkeypatch, fail)
    assert find_or_download(SCHNELL) == path
    assert (
        f"{SCHNELL} in the cache lacks text_encoder_2/; {SCHNELL} could not be downloaded"
        in caplog.text
    )


class GatedRepoError(Exception):
    pass


class RepositoryNotFoundError(Exception):
    pass


@pytest.mark.parametrize(
    "error, advice",
    [
        (
            GatedRepoError("401 Client Error.\n\nAccess to model is restricted.\nPlease log in."),
            "accept its licence at https://huggingface.co/black-forest-labs/FLUX.1-dev "
            "and log in with `hf auth login`",
        ),
        (
            RepositoryNotFoundError("401 Client Error.\n\nRepository Not Found"),
            "check the name and the network connection",
        ),
        (
            ConnectionError("no route to host\n" * 50),
            "check the name and the network connection, or give a folder that holds it",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_download_that_fails_says_what_to_do_in_one_line(cache, monkeypatch, error, advice):
    def fail(_):
        raise error

    download(monkeypatch, fail)
    with pytest.raises(FileNotFoundError) as caught:
        loading.load("dev")
    message = str(caught.value)
    assert message.startswith(
        f"black-forest-labs/FLUX.1-dev could not be downloaded ({type(error).__name__}): {advice}"
    )
    assert "\n" not in message


# What the official repository holds.
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
REPOSITORY = {
    "model_index.json": True,
    "scheduler/scheduler_config.json": True,
    "transformer/config.json": True,
    "transformer/diffusion_pytorch_model.safetensors.index.json": True,
    **{f"transformer/{shard}": True for shard in SHARDS},
    "vae/config.json": True,
    "vae/diffusion_pytorch_model.safetensors": True,
    "text_encoder/config.json": True,
    "text_encoder/model.safetensors": True,
    "text_encoder_2/config.json": True,
    "text_encoder_2/model-00001-of-00002.safetensors": True,
    "text_encoder_2/model.safetensors.index.json": True,
    "tokenizer/vocab.json": True,
    "tokenizer/merges.txt": True,
    "tokenizer/tokenizer_config.json": True,
    "tokenizer_2/spiece.model": True,
    "tokenizer_2/tokenizer.json": True,
    "tokenizer_2/tokenizer_config.json": True,
    "flux1-dev.safetensors": False,
    "ae.safetensors": False,
    "README.md": False,
    "dev_grid.jpg": False,
    ".gitattributes": False,
    "LICENSE.md": False,
}


def test_the_download_fetches_what_load_needs_and_no_second_copy():
    """Oracle: the files of the official repository and, for the patterns' meaning, fnmatch, which
    the hub uses."""
    assert {
        file: any(fnmatch(file, pattern) for pattern in WANTED) for file in REPOSITORY
    } == REPOSITORY


def test_every_official_name_is_a_repository():
    assert len(set(OFFICIAL.values())) == len(OFFICIAL)
    assert hub.OFFICIAL["dev"] == "black-forest-labs/FLUX.1-dev"
    assert all(repo.startswith("black-forest-labs/FLUX.1-") for repo in OFFICIAL.values())


def test_a_single_network_is_found_on_disk_or_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--net" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "net.safetensors").touch()
    assert find_network("owner/net", "ControlNet") == snapshot
    assert find_network(snapshot, "ControlNet") == snapshot
    with pytest.raises(
        FileNotFoundError,
        match="the ControlNet nowhere does not exist: expected a file, a folder or a Hub id",
    ):
        find_network("nowhere", "ControlNet")


def test_a_shipped_adapter_is_found_by_its_name(tmp_path, monkeypatch):
    """Its name comes before a folder of that name; nothing else of the package's folder is one."""
    shipped = tmp_path / "weights"
    for file in (
        "tiny/transformer/diffusion_pytorch_model.safetensors",
        "tiny-neon/pytorch_lora_weights.safetensors",
        "tiny-net/diffusion_pytorch_model.safetensors",
        "tiny-ip/ip_adapter.safetensors",
        "tiny-canny/lora.safetensors",
    ):
        (shipped / file).parent.mkdir(parents=True)
        (shipped / file).touch()
    monkeypatch.setattr(hub, "SHIPPED", shipped)
    assert hub.shipped_adapters() == {
        "tiny-neon": "LoRA",
        "tiny-net": "ControlNet",
        "tiny-ip": "IP-Adapter",
    }
    assert "tiny-net        shipped, a ControlNet" in finding.list_models()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-net").mkdir()
    assert find_network("tiny-net", "ControlNet") == shipped / "tiny-net"
    assert (
        find_network(Path("tiny-net"), "ControlNet")
        == find_network("./tiny-net", "ControlNet")
        == Path("tiny-net")
    )
    for name in ("tiny", "tiny-neon"):  # a model, a LoRA
        with pytest.raises(
            FileNotFoundError,
            match=f"the ControlNet {name} does not exist: .* a Hub id, or tiny-net$",
        ):
            find_network(name, "ControlNet")
    with pytest.raises(FileNotFoundError, match="a Hub id$"):
        find_network("nowhere", "image encoder")


def test_of_a_folder_the_usual_file_is_taken_or_else_the_only_one(tmp_path):
    (tmp_path / "b.safetensors").touch()
    assert (
        hub.find_file(tmp_path, "LoRA")
        == hub.find_file(tmp_path / "b.safetensors", "LoRA")
        == tmp_path / "b.safetensors"
    )
    (tmp_path / "a.sft").touch()
    with pytest.raises(
        ValueError, match="has 2 safetensors files: name the LoRA's, one of a.sft, b.safetensors"
    ):
        hub.find_file(tmp_path, "LoRA", ["c.safetensors"])
    assert (
        hub.find_file(tmp_path, "LoRA", ["c.safetensors", "b.safetensors"])
        == tmp_path / "b.safetensors"
    )


# ---------------------------------------------------------------------------- files of a repository


@pytest.mark.parametrize(
    "name, expected",
    [
        ("me/flux/a.safetensors", ("me/flux", "a.safetensors")),
        ("me/flux/x/y/a.gguf", ("me/flux", "x/y/a.gguf")),
        ("me/flux.1-dev_2/ae.sft", ("me/flux.1-dev_2", "ae.sft")),
        ("me/flux", None),
        ("me/a.safetensors", None),
        ("/me/flux/a.safetensors", None),
        ("./me/flux/a.safetensors", None),
        ("~/me/flux/a.safetensors", None),
        ("me/flux/../a.safetensors", None),
        ("me/flux/a.bin", None),
        ("a.safetensors", None),
    ],
)
def test_a_file_of_a_repository_is_told_from_a_path(name, expected):
    assert hub.split_repo_file(name) == expected


def test_a_file_of_a_repository_is_found_in_the_cache(cache, no_hub):
    path = snapshot(cache, "me/collection", "aaa", "one.safetensors", "steps/two.safetensors")
    assert (
        find_network("me/collection/steps/two.safetensors", "LoRA")
        == path / "steps/two.safetensors"
    )
    assert finding.find_source("me/collection/one.safetensors") == path / "one.safetensors"
    assert finding.find_transformer("me/collection/one.safetensors") == path / "one.safetensors"
    with pytest.raises(FileNotFoundError, match="me/collection is not in .*: `pip install"):
        find_network("me/collection/three.safetensors", "LoRA")


def test_of_a_repository_only_the_named_file_is_downloaded_with_its_config(cache, monkeypatch):
    path = snapshot(cache, "me/collection", "aaa", "steps/one.safetensors")
    calls = download(monkeypatch, lambda repo: str(path))
    (path / "steps/one.safetensors").rename(path / "one")
    with pytest.raises(
        FileNotFoundError, match="me/collection on the Hub has no file steps/one.safetensors"
    ):
        find_network("me/collection/steps/one.safetensors", "LoRA")
    wanted = ["steps/one.safetensors", "steps/adapter_config.json", "steps/config.json"]
    assert calls == [("me/collection", {"allow_patterns": wanted, "cache_dir": cache})]


def test_a_repository_with_several_loras_lists_them_and_downloads_nothing(cache, monkeypatch):
    calls = download(
        monkeypatch,
        lambda repo: "",
        ("README.md", "a.safetensors", "b/c.safetensors", "d.safetensors"),
    )
    with pytest.raises(ValueError) as caught:
        find_network("me/collection", "LoRA")
    assert str(caught.value) == (
        "me/collection on the Hub has 3 files: name the LoRA's, as in me/collection/a.safetensors; "
        "there are a.safetensors, b/c.safetensors, d.safetensors"
    )
    assert not calls


@pytest.mark.parametrize(
    "what, files, wanted",
    [
        ("LoRA", ("a.safetensors", "README.md"), ["a.safetensors"]),
        (
            "LoRA",
            ("pytorch_lora_weights.safetensors", "old.safetensors", "x.json"),
            ["pytorch_lora_weights.safetensors", "x.json"],
        ),
        ("IP-Adapter", ("ip_adapter.safetensors", "b.safetensors"), ["ip_adapter.safetensors"]),
        (
            "ControlNet",
            (
                "config.json",
                "a-00001-of-00002.safetensors",
                "a-00002-of-00002.safetensors",
                "b/c.safetensors",
            ),
            ["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors", "config.json"],
        ),
    ],
)
def test_of_a_repository_with_one_network_its_files_are_downloaded(
    cache, monkeypatch, what, files, wanted
):
    calls = download(monkeypatch, lambda repo: str(cache), files)
    assert find_network("me/net", what) == cache
    assert calls == [("me/net", {"allow_patterns": wanted, "cache_dir": cache})]
