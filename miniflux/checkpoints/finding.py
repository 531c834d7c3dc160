"""Names -> folders, and folders -> the files of their parts: shipped models, paths, short names,
the cache, the Hub."""

from pathlib import Path

from ..files import read_json
from . import layouts
from .formats import PICKLES, SAFETENSORS, listing
from .hub import (
    OFFICIAL,
    SHIPPED,
    cache_folder,
    find_in_cache,
    find_or_download,
    find_repo_file,
    is_repo,
    shipped_adapters,
    split_repo_file,
)
from .names import WHOLE_MODEL, find_prefix

# Where each part may lie in a folder, the best place first: the diffusers layout, then the
# original one.
PARTS = {
    "transformer": ("transformer/*.safetensors", "flux1*.safetensors", "flux1*.sft", "flux1*.gguf",
                    "transformer"),
    "vae": ("vae/*.safetensors", "ae.safetensors", "ae.sft", "vae"),
    "text_encoder": ("text_encoder/*.safetensors", "clip_l*.safetensors", "clip_l*.sft",
                     "text_encoder"),
    "text_encoder_2": ("text_encoder_2/*.safetensors", "t5xxl*.safetensors", "t5xxl*.sft",
                       "t5*.gguf", "text_encoder_2"),
    "tokenizer": ("tokenizer",),
    "tokenizer_2": ("tokenizer_2",),
    "image_embedder": ("image_embedder", "flux1-redux*.safetensors", "flux1-redux*.sft"),
}
# Where the text encoders come from when a folder in the original layout brings none.
TEXT_ENCODERS = {"": "openai/clip-vit-large-patch14", "_2": "google/t5-v1_1-xxl"}
# Of a folder with what turns a shipped model into another: a LoRA, or Redux.
VARIANT = "variant.json"


def shipped_models() -> dict[str, Path]:
    """The models that come with the package: name -> folder."""
    return {folder.name: folder for folder in sorted(SHIPPED.glob("*/"))
            if (folder / "model_index.json").is_file() or (folder / VARIANT).is_file()}


def whole_models() -> list[str]:
    """Those of them that are no variant of another."""
    return [name for name, folder in shipped_models().items() if not (folder / VARIANT).is_file()]


def find_source(source: str | Path) -> Path:
    """The folder or file that `source` names: a shipped model, a path, an official short name, a
    Hub id or a file on the Hub."""
    name, shipped = str(source), shipped_models()
    # Note: names come before paths, or a folder that happens to be called "dev" would hide the
    # model: that one is "./dev".
    if name in shipped and isinstance(source, str):
        return shipped[name]
    if name in OFFICIAL and isinstance(source, str):
        return find_or_download(OFFICIAL[name])
    if (path := Path(source).expanduser()).exists():
        return path
    if found := split_repo_file(name):
        return find_repo_file(*found)
    if is_repo(name):
        return find_or_download(name)
    known = ", ".join([*shipped, *OFFICIAL])
    raise FileNotFoundError(f"{name!r} is neither a folder nor a known model: expected {known}, a "
                            "Hub id such as black-forest-labs/FLUX.1-dev, or the path of a "
                            "checkpoint")


def find_transformer(source: str | Path) -> Path:
    """The file or folder of a transformer that replaces another: a path, or a file on the Hub."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if found := split_repo_file(str(source)):
        return find_repo_file(*found)
    raise FileNotFoundError(f"the transformer {source} does not exist: expected a file or a "
                            "folder, or a file on the Hub, owner/name/file.safetensors")


def find_part(folder: Path, part: str) -> list[Path]:
    """The files, or the folder, of a part; none if it is not there."""
    for pattern in PARTS[part]:
        found = sorted(folder.glob(pattern))
        if part == "transformer":                           # Redux's file has the name of one
            found = [path for path in found if not path.name.startswith("flux1-redux")]
        if found:
            return found
    return []


def find_parts(folder: Path, transformer: Path | None = None) -> dict[str, Path]:
    """Where each part of a model lies: {part name of the diffusers layout: folder or file};
    `transformer` replaces one."""
    index = folder / "model_index.json"
    name = read_json(index).get("_class_name") if index.is_file() else None
    if name is not None and not str(name).startswith("Flux"):
        raise ValueError(f"{index} describes a {name!r:.60}, expected a FluxPipeline")
    files = {}
    for part in PARTS:
        found = find_part(folder, part)
        if found:
            files[part] = found[0] if found[0].parent == folder else found[0].parent
        several = len(found) > 1 and found[0].parent == folder
        if part == "transformer" and several and transformer is None:
            names = listing([path.name for path in found])
            raise ValueError(f"{folder} has the transformers {names}: choose with transformer=")
    if transformer is not None:
        files["transformer"] = transformer
    if "transformer" not in files:
        what = "holds no FLUX.1 model: it has no"
        if index.is_file():
            what = "is incomplete: it has a model_index.json, but not the"
        raise ValueError(f"{folder} {what} folder transformer/ (diffusers layout) "
                         "or file flux1-*.safetensors (original layout)")
    return with_cached_encoders(files)


def find_parts_in_file(path: Path, transformer: Path | None = None) -> dict[str, Path]:
    """The same for a single file that holds a whole model, as ComfyUI's do."""
    known = path.suffix in (*SAFETENSORS, ".gguf")
    names = layouts.tensor_names(path) if known else []
    files = {part: path for part in WHOLE_MODEL if find_prefix(names, part) is not None}
    if not {"transformer", "vae"} <= set(files):
        raise ValueError(f"{path} is a file without a whole model: "
                         "load a folder, and give a single file as transformer=")
    return with_cached_encoders(files | ({"transformer": transformer} if transformer else {}))


def with_cached_encoders(files: dict[str, Path]) -> dict[str, Path]:
    """What an original layout lacks, from the cache: tokenizers, and text encoders."""
    if files["transformer"].is_file():
        for suffix, repo in TEXT_ENCODERS.items():
            if snapshot := find_in_cache(repo):
                files.setdefault("tokenizer" + suffix, snapshot)
                if any(path.suffix in (*SAFETENSORS, *PICKLES) for path in snapshot.iterdir()):
                    files.setdefault("text_encoder" + suffix, snapshot)
    return files


def list_models() -> list[str]:
    """One line a model: what is shipped, with the adapters, and which official models are in the
    local cache."""
    lines = [f"{name:15} shipped" for name in shipped_models()]
    lines += [f"{name:15} shipped, a {what}" for name, what in shipped_adapters().items()]
    for name, repo in OFFICIAL.items():
        found = find_in_cache(repo)
        lines.append(f"{name:15} {repo}: " + (f"{found}" if found else f"not in {cache_folder()}"))
    return lines
