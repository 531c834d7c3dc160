"""miniflux: the FLUX.1 family of text-to-image models, small enough to read.

    from miniflux import load, generate
    picture, = generate(load(), "a fox next to a red apple", seed=7)

Every task is a file, a function and a command of the same name. The names below are loaded when
they are first used, so importing miniflux does no work.
"""

import importlib
import sys
from types import ModuleType

__version__ = "0.1.0"

# Public name -> the file it lives in.
_NAMES = {
    "load": "loading",
    "save": "checkpoints.saving",
    "Flux": "flux",
    "FluxConfig": "flux",
    "generate": "generate",
    "image_to_image": "image_to_image",
    "inpaint": "inpaint",
    "fill": "fill",
    "control": "control",
    "redux": "redux",
    "redux_prompt": "redux",
    "kontext_edit": "kontext_edit",
    "kontext_inpaint": "kontext_inpaint",
    "Prompt": "prompt",
    "encode_prompt": "prompt",
    "add_redux": "adapters.redux",
    "add_lora": "adapters.lora",
    "set_lora_scales": "adapters.lora",
    "remove_lora": "adapters.lora",
    "load_controlnet": "adapters.controlnet",
    "Control": "adapters.controlnet",
    "add_ip_adapter": "adapters.ip_adapter",
    "quantize": "engine.quantize",
    "offload": "engine.offload",
    "cache": "engine.caching",
    "tile": "engine.tiling",
    "compile": "engine.compiling",
    "distribute": "engine.distributed",
    "precompute_modulation": "engine.modulation",
    "canny": "imaging.canny",
    "depth": "imaging.depth",
    "load_depth": "imaging.depth",
    "mask_from_alpha": "imaging.masks",
    "blur_mask": "imaging.masks",
    "expand_canvas": "imaging.masks",
    "fit_preview": "imaging.preview",
    "load_preview": "imaging.preview",
    "add_watermark": "imaging.watermark",
    "read_watermark": "imaging.watermark",
    "info": "imaging.info",
    "load_filters": "safety.filters",
    "is_flagged": "safety.filters",
    "stop_flagged": "safety.filters",
}
# Note: `compile` stays out of `import *`, where it would hide Python's own.
__all__ = ["__version__", *(name for name in _NAMES if name != "compile")]


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module 'miniflux' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "compile"])


class _Package(ModuleType):
    """Keeps `miniflux.fill` the function, even after `import miniflux.fill`.

    Importing a submodule binds the module to its name in the package. Task, file and function share
    one name, so the function is bound instead, with the module's other names as its attributes:
    after `import miniflux.generate as g`, `g(...)` paints and `g.sample` is the algorithm."""

    def __setattr__(self, name: str, value) -> None:
        if isinstance(value, ModuleType) and _NAMES.get(name, "").rpartition(".")[2] == name:
            function = getattr(value, name)
            for key, attribute in vars(value).items():
                if not key.startswith("__"):
                    vars(function).setdefault(key, attribute)
            value = function
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if getattr(sys, "argv", [""])[:1] == ["-m"]:                # python -m miniflux.TASK begins
    from .command import expect_interrupt
    expect_interrupt()
