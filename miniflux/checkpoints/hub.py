"""Where checkpoints lie on this machine: in the package, in the local Hugging Face cache, or in a download into it.

The cache is read directly, so nothing has to be installed to use what is already there; downloading needs the optional
package `huggingface_hub` (`pip install "miniflux-torch[hub]"`).
"""

import os
from collections.abc import Sequence
from pathlib import Path

SHIPPED = Path(__file__).parents[1] / "tiny" / "weights"
# What a shipped folder is with this file directly in it.
SHIPPED_ADAPTERS = {"pytorch_lora_weights.safetensors": "LoRA", "diffusion_pytorch_model.safetensors": "ControlNet",
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
# Note: the same transformer and autoencoder also lie beside the folders, as flux1-*.safetensors (24 GB) and ae.safetensors.
WANTED = ["model_index.json", "scheduler/*", "text_encoder*/*", "tokenizer*/*", "transformer/*", "vae/*", "image_encoder/*",
          "image_embedder/*"]
# In a snapshot that is more than a few stray files.
WEIGHTS = ["transformer/*.safetensors", "flux1*.safetensors", "image_embedder/*.safetensors"]
NETWORK = ["*.json", "*.safetensors"]              # of a repository that holds a single network


def cache_folder() -> Path:
    """The folder `hub` of the Hugging Face cache, as the environment variables place it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def find_in_cache(repo: str) -> Path | None:
    """The newest snapshot folder of a repository "owner/name" in the cache, or None."""
    folder = cache_folder() / ("models--" + repo.replace("/", "--"))
    main = folder / "refs" / "main"
    if main.is_file() and (commit := main.read_text().strip()) and (folder / "snapshots" / commit).is_dir():
        return folder / "snapshots" / commit
    snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def is_repo(name: str) -> bool:
    """Whether this may be the name of a repository, "owner/name"."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".safetensors")


def shipped_adapters() -> dict[str, str]:
    """The LoRAs, ControlNets and IP-Adapters that come with the package: name -> which of these."""
    return {path.parent.name: what for file, what in SHIPPED_ADAPTERS.items() for path in sorted(SHIPPED.glob(f"*/{file}"))}


def find_network(source: str | Path, what: str) -> Path:
    """The file or folder of a single network, a shipped one's too, or the snapshot folder of its repository."""
    shipped = [name for name, kind in shipped_adapters().items() if kind == what]
    if isinstance(source, str) and source in shipped:                           # names come before paths, as in `find_source`
        return SHIPPED / source
    if (path := Path(source).expanduser()).exists():
        return path
    if is_repo(str(source)):
        return find_or_download(str(source), NETWORK, NETWORK[1:])
    raise FileNotFoundError(f"the {what} {source} does not exist: expected a file, a folder or a Hub id" + ", or ".join(["", *shipped]))


def find_file(path: Path, what: str, usual: Sequence[str] = ()) -> Path:
    """The file of a network that is a single one: this, or of a folder the first usual one that is there, or else the only one."""
    if not path.is_dir():
        return path
    for name in usual:
        if (path / name).is_file():
            return path / name
    if len(files := sorted(path.glob("*.safetensors"))) != 1:
        raise ValueError(f"{path} has {len(files)} safetensors files: name the {what}'s")
    return files[0]


def find_or_download(repo: str, wanted: list[str] = WANTED, weights: list[str] = WEIGHTS) -> Path:
    """The snapshot folder of a repository, by default of a FLUX.1 model; if it is not in the cache, or without its weights,
    `huggingface_hub` downloads what is wanted.

    Raises FileNotFoundError with what to do when it cannot be had."""
    snapshot = find_in_cache(repo)
    if snapshot and any(any(snapshot.glob(pattern)) for pattern in weights):
        return snapshot
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        if snapshot:
            return snapshot                                 # the loader says what it lacks
        raise FileNotFoundError(f'{repo} is not in {cache_folder()}: `pip install "miniflux-torch[hub]"` to download it, '
                                "or give a folder that holds it") from None
    try:
        return Path(snapshot_download(repo, allow_patterns=wanted, cache_dir=cache_folder()))
    except Exception as error:                              # the hub's errors have many types and many lines
        kind = type(error).__name__
        advice = (f"accept its licence at https://huggingface.co/{repo} and log in with `hf auth login`"
                  if "Gated" in kind or "403" in str(error) else
                  "check the name and the network connection, or give a folder that holds it")
        raise FileNotFoundError(f"{repo} could not be downloaded ({kind}): {advice}") from None
