"""miniflux: the FLUX.1 family of text-to-image models, small enough to read.

    from miniflux import load, generate
    picture, = generate(load(), "a fox next to a red apple", seed=7)

Every task is a file, a function and a command of the same name. The names below are loaded when they are first used.
"""

import importlib
import sys
from types import ModuleType

__version__ = "0.1.0"

_FILES = ("generate", "image_to_image", "inpaint", "fill", "control", "redux", "kontext_edit", "kontext_inpaint", "canny",
          "depth", "info")
_NAMES = {"load": "loading", "Flux": "flux", "FluxConfig": "flux", "add_redux": "adapters.redux", "Prompt": "prompt", "encode_prompt": "prompt",
          "redux_prompt": "redux", "add_lora": "adapters.lora", "set_lora_scales": "adapters.lora", "remove_lora": "adapters.lora",
          "load_controlnet": "controlnet", "Control": "controlnet", "add_ip_adapter": "adapters.ip_adapter", "quantize": "engine.quantize",
          "offload": "engine.offload", "cache": "engine.caching", "tile": "engine.tiling", "compile": "engine.compiling",
          "distribute": "engine.distributed", "precompute_modulation": "engine.modulation",
          "load_depth": "depth", "load_filters": "safety", "is_flagged": "safety", "stop_flagged": "safety",
          "add_watermark": "watermark", "read_watermark": "watermark", "fit_preview": "preview", "load_preview": "preview",
          "mask_from_alpha": "masks", "blur_mask": "masks", "expand_canvas": "masks", **dict(zip(_FILES, _FILES))}
__all__ = ["__version__", *_NAMES]


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module 'miniflux' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """`miniflux.generate` stays the function even after `import miniflux.generate`, which would bind the module."""

    def __setattr__(self, name: str, value) -> None:
        is_task = isinstance(value, ModuleType) and _NAMES.get(name) == name
        super().__setattr__(name, getattr(value, name) if is_task else value)


sys.modules[__name__].__class__ = _Package
