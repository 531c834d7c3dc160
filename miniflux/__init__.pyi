# What type checkers and editors see of `__init__.py`, whose names are loaded on first use.

from .adapters.controlnet import Control as Control
from .adapters.controlnet import load_controlnet as load_controlnet
from .adapters.ip_adapter import add_ip_adapter as add_ip_adapter
from .adapters.lora import add_lora as add_lora
from .adapters.lora import remove_lora as remove_lora
from .adapters.lora import set_lora_scales as set_lora_scales
from .adapters.redux import add_redux as add_redux
from .checkpoints.saving import save as save
from .control import control as control
from .engine.caching import cache as cache
from .engine.compiling import compile as compile
from .engine.distributed import distribute as distribute
from .engine.modulation import precompute_modulation as precompute_modulation
from .engine.offload import offload as offload
from .engine.quantize import quantize as quantize
from .engine.tiling import tile as tile
from .fill import fill as fill
from .flux import Flux as Flux
from .flux import FluxConfig as FluxConfig
from .generate import generate as generate
from .image_to_image import image_to_image as image_to_image
from .imaging.canny import canny as canny
from .imaging.depth import depth as depth
from .imaging.depth import load_depth as load_depth
from .imaging.info import info as info
from .imaging.masks import blur_mask as blur_mask
from .imaging.masks import expand_canvas as expand_canvas
from .imaging.masks import mask_from_alpha as mask_from_alpha
from .imaging.preview import fit_preview as fit_preview
from .imaging.preview import load_preview as load_preview
from .imaging.watermark import add_watermark as add_watermark
from .imaging.watermark import read_watermark as read_watermark
from .inpaint import inpaint as inpaint
from .kontext_edit import kontext_edit as kontext_edit
from .kontext_inpaint import kontext_inpaint as kontext_inpaint
from .loading import load as load
from .prompt import Prompt as Prompt
from .prompt import encode_prompt as encode_prompt
from .redux import redux as redux
from .redux import redux_prompt as redux_prompt
from .safety.filters import is_flagged as is_flagged
from .safety.filters import load_filters as load_filters
from .safety.filters import stop_flagged as stop_flagged

__version__: str
