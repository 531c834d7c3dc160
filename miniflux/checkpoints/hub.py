"""Where checkpoints lie on this machine: in the package, in the local Hugging Face cache, or in a
download into it.

The cache is read directly, so nothing has to be installed to use what is already there; downloading
needs the optional package `huggingface_hub` (`pip install "miniflux-torch[hub]"`).
"""

import logging
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from ..files import read_json
from .formats import SAFETENSORS, listing, read_weight_map

log = logging.getLogger("miniflux")

WEIGHT_FILES = (*SAFETENSORS, ".gguf")
SHIPPED = Path(__file__).parents[1] / "tiny" / "weights"
# What a shipped folder is with this file directly in it.
SHIPPED_ADAPTERS = {"pytorch_lora_weights.safetensors": "LoRA",
                    "diffusion_pytorch_model.safetensors": "ControlNet",
                    "ip_adapter.safetensors": "IP-Adapter"}

OFFICIAL = {
    "schnell": "black-forest-labs/FLUX.1-schnell",
    "dev": "black-forest-labs/FLUX.1-dev",
    "krea": "black-forest-labs/FLUX.1-Krea-dev",
    "fill": "black-forest-labs/FLUX.1-Fill-dev",
    "canny": "black-forest-labs/FLUX.1-Canny-dev",
    "depth": "black-forest-labs/FLUX.1-Depth-dev",
    "kontext": "black-forest-labs/FLUX.1-Kontext-dev",
    "redux": "black-forest-labs/FLUX.1-Redux-dev",
}
# Note: the same transformer and autoencoder also lie beside the folders, as flux1-*.safetensors
# (24 GB) and ae.safetensors.
WANTED = ["model_index.json", "scheduler/*", "text_encoder*/*", "tokenizer*/*", "transformer/*",
          "vae/*", "image_encoder/*", "image_embedder/*"]
# In a snapshot that is more than a few stray files.
WEIGHTS = ["transformer/*.safetensors", "flux1*.safetensors", "flux1*.sft", "flux1*.gguf",
           "image_embedder/*.safetensors"]
# The files of an adapter's repository or folder that are taken without being named.
USUAL = {"LoRA": ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"),
         "IP-Adapter": ("ip_adapter.safetensors",)}
# One of these makes a part of a pipeline whole. A scheduler is a JSON file, a tokenizer several.
PART_FILES = ("*.safetensors", "scheduler_config.json", "tokenizer.json", "vocab.json",
              "spiece.model")


def cache_folder() -> Path:
    """The folder `hub` of the Hugging Face cache, where the environment variables place it.

    The same rules as in `huggingface_hub.constants`, which reads the variables only once."""
    def expand(path: str) -> str:
        return os.path.expandvars(os.path.expanduser(path))

    caches = os.getenv("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache"))
    home = expand(os.getenv("HF_HOME", os.path.join(caches, "huggingface")))
    # Note: the second name is the old one; the new one comes first.
    old = os.getenv("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub"))
    return Path(expand(os.getenv("HF_HUB_CACHE", old)))


def find_in_cache(repo: str) -> Path | None:
    """The newest snapshot folder of a repository "owner/name" in the cache, or None."""
    folder = cache_folder() / ("models--" + repo.replace("/", "--"))
    main = folder / "refs" / "main"
    commit = main.read_text().strip() if main.is_file() else ""
    if commit and (folder / "snapshots" / commit).is_dir():
        return folder / "snapshots" / commit
    snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def is_repo(name: str) -> bool:
    """Whether this may be the name of a repository, "owner/name"."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not name.endswith(WEIGHT_FILES)


def split_repo_file(name: str) -> tuple[str, str] | None:
    """("owner/name", "path/file.safetensors") if this may be a file of a repository, else None."""
    owner, _, rest = name.partition("/")
    repo, _, file = rest.partition("/")
    is_file = file.endswith(WEIGHT_FILES) and ".." not in file.split("/")
    return (f"{owner}/{repo}", file) if is_file and is_repo(f"{owner}/{repo}") else None


def shipped_adapters() -> dict[str, str]:
    """The LoRAs, ControlNets and IP-Adapters that come with the package: name -> which of these."""
    return {path.parent.name: what for file, what in SHIPPED_ADAPTERS.items()
            for path in sorted(SHIPPED.glob(f"*/{file}"))}


def find_network(source: str | Path, what: str) -> Path:
    """The file or folder of a single network.

    source: a shipped name, a path, a Hub id, or a file of a repository,
        "owner/name/path/file.safetensors".
    what: "LoRA", "ControlNet", ...: which shipped ones count, and the word of the errors."""
    shipped = [name for name, kind in shipped_adapters().items() if kind == what]
    # Note: names come before paths, as in `find_source`.
    if isinstance(source, str) and source in shipped:
        return SHIPPED / source
    if (path := Path(source).expanduser()).exists():
        return path
    if found := split_repo_file(str(source)):
        return find_repo_file(*found)
    if is_repo(str(source)):
        return find_repo_network(str(source), what)
    names = ", or ".join(["", *shipped])
    raise FileNotFoundError(f"the {what} {source} does not exist: "
                            f"expected a file, a folder or a Hub id{names}")


def find_file(path: Path, what: str, usual: Sequence[str] = ()) -> Path:
    """The file of a network that is a single one: this, or of a folder the first usual one that is
    there, or else the only one."""
    if not path.is_dir():
        return path
    for name in usual:
        if (path / name).is_file():
            return path / name
    files = sorted(file for file in path.iterdir() if file.suffix in SAFETENSORS)
    if not files:
        raise ValueError(f"{path} has no safetensors file: expected the {what}'s")
    if len(files) > 1:
        raise ValueError(f"{path} has {len(files)} safetensors files: name the {what}'s, one of "
                         f"{listing([file.name for file in files])}")
    return files[0]


# ------------------------------------------------------------------------------------ repositories


def find_or_download(repo: str, wanted: list[str] = WANTED, weights: list[str] = WEIGHTS) -> Path:
    """The snapshot folder of a repository, by default of a FLUX.1 model. What it lacks of the
    wanted files is downloaded by `huggingface_hub`.

    Raises FileNotFoundError with what to do when nothing can be had."""
    snapshot = find_in_cache(repo)
    has_weights = bool(snapshot) and any(any(snapshot.glob(pattern)) for pattern in weights)
    missing = missing_files(snapshot) if has_weights else []
    if has_weights and not missing:
        return snapshot
    try:
        return download(repo, wanted)
    except FileNotFoundError as error:
        if has_weights or (snapshot and not has_hub()):
            # Where it matters, the loader names what is not there.
            lacking = listing(missing or weights[:1])
            log.warning("%s in the cache lacks %s; %s", repo, lacking, error)
            return snapshot
        raise


def missing_files(snapshot: Path) -> list[str]:
    """What a snapshot lacks for certain: shards that an index names, and parts of a pipeline."""
    missing = []
    for index in sorted([*snapshot.glob("*.index*.json"), *snapshot.glob("*/*.index*.json")]):
        shards = sorted(set(read_weight_map(index).values()))
        missing += [f"{index.parent.name}/{shard}" for shard in shards
                    if not (index.parent / shard).is_file()]
    index, folder = snapshot / "model_index.json", snapshot / "transformer"
    if index.is_file() and any(folder.glob("*.safetensors")):
        wanted = [pattern.removesuffix("/*") for pattern in WANTED]
        for part, kind in read_json(index).items():
            is_part = isinstance(kind, list) and None not in kind
            if is_part and any(fnmatch(part, pattern) for pattern in wanted):
                if not any(any((snapshot / part).glob(pattern)) for pattern in PART_FILES):
                    missing.append(f"{part}/")
    return missing


def find_repo_file(repo: str, file: str) -> Path:
    """One file of a repository, from the cache, else from the Hub; with the config beside it."""
    snapshot = find_in_cache(repo)
    if snapshot and (snapshot / file).is_file():
        return snapshot / file
    folder = file.rpartition("/")[0]
    configs = [f"{folder}/{name}".lstrip("/") for name in ("adapter_config.json", "config.json")]
    path = download(repo, [file, *configs]) / file
    if not path.is_file():
        raise FileNotFoundError(f"{repo} on the Hub has no file {file}")
    return path


def find_repo_network(repo: str, what: str) -> Path:
    """The snapshot folder of a repository that holds a single network; of one with several adapters
    nothing is downloaded: the error lists them."""
    snapshot = find_in_cache(repo)
    has_weights = bool(snapshot) and any(path.suffix in SAFETENSORS for path in snapshot.iterdir())
    if has_weights and not missing_files(snapshot):
        return snapshot
    try:
        names = list_files(repo)
    except FileNotFoundError as error:
        if not has_weights:
            raise
        log.warning("%s in the cache lacks %s; %s", repo, listing(missing_files(snapshot)), error)
        return snapshot
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith(SAFETENSORS)]
    if usual := [name for name in USUAL.get(what, ()) if name in weights][:1]:
        weights = usual
    if "config.json" not in top and len(weights) != 1 or what == "LoRA" and len(weights) != 1:
        everywhere = sorted(name for name in names if name.endswith(SAFETENSORS))
        if not everywhere:
            raise ValueError(f"{repo} on the Hub has no safetensors file: expected the {what}'s")
        raise ValueError(f"{repo} on the Hub has {len(everywhere)} files: name the {what}'s, as in "
                         f"{repo}/{everywhere[0]}; there are {listing(everywhere)}")
    return download(repo, [*weights, *(name for name in top if name.endswith(".json"))])


# ----------------------------------------------------------------------------------------- the Hub


def has_hub() -> bool:
    """Whether `huggingface_hub` is installed."""
    try:
        import huggingface_hub  # noqa: F401  (only whether it is there)
    except ImportError:
        return False
    return True


def download(repo: str, wanted: list[str]) -> Path:
    """The snapshot folder of a repository, in which all wanted files are there."""
    return Path(ask_hub(repo, "snapshot_download", allow_patterns=wanted, cache_dir=cache_folder()))


def list_files(repo: str) -> list[str]:
    """The names of the files of a repository on the Hub."""
    return list(ask_hub(repo, "list_repo_files"))


def ask_hub(repo: str, function: str, **keywords):
    """Calls a function of `huggingface_hub` with a repository. Whatever goes wrong is a
    FileNotFoundError with what to do."""
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(f"{repo} is not in {cache_folder()}: "
                                '`pip install "miniflux-torch[hub]"` to download it, '
                                "or give a folder that holds it") from None
    try:
        return getattr(huggingface_hub, function)(repo, **keywords)
    except Exception as error:              # the hub's errors have many types and many lines
        kind = type(error).__name__
        is_gated = "Gated" in kind or "403" in str(error)
        advice = "check the name and the network connection, or give a folder that holds it"
        if is_gated:
            advice = (f"accept its licence at https://huggingface.co/{repo} "
                      "and log in with `hf auth login`")
        raise FileNotFoundError(f"{repo} could not be downloaded ({kind}): {advice}") from None
