"""The bundle: everything a FLUX.1 model consists of. Data only; `loading.py` fills it."""

from dataclasses import dataclass, field

from torch import nn

from .networks.autoencoder import Autoencoder
from .networks.clip import CLIPText, CLIPVision
from .networks.mmdit import MMDiT
from .networks.siglip import ReduxEmbedder, SigLIP
from .networks.t5 import T5
from .tokenizers import CLIPTokenizer, T5Tokenizer


@dataclass(frozen=True)
class Schedule:
    """How the times of a sampler are spaced. The defaults are FLUX.1-dev's.

    The names are those of diffusers' `FlowMatchEulerDiscreteScheduler`; `sampling.schedule` has the
    formulas."""

    use_dynamic_shifting: bool = True    # the shift grows with the number of image tokens
    shift: float = 1.0                   # the shift where it does not; 1 changes nothing
    base_shift: float = 0.5              # mu for an image of base_image_seq_len tokens
    max_shift: float = 1.15              # mu for an image of max_image_seq_len tokens
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"  # the shift is e^mu; "linear": it is mu
    shift_terminal: float | None = None  # the last time before 0, to which all are stretched
    spacing: str = "even"                # or "karras", "exponential", "beta"


SCHEDULES = {"dev": Schedule(), "schnell": Schedule(use_dynamic_shifting=False)}


@dataclass(frozen=True)
class FluxConfig:
    """What is not in a network's weights. The defaults are FLUX.1-dev's."""

    name: str = "dev"
    size: int = 1024                 # default width and height in pixels
    max_text_tokens: int = 512       # T5 tokens a prompt is padded to
    schedule: Schedule = Schedule()
    few_steps: bool = False          # whether it was distilled to need four steps (schnell)
    words: frozenset[str] | None = None  # all words that it was taught, where its folder lists them


@dataclass(frozen=True)
class Flux:
    """A model, ready to use. Parts that a folder does not bring are None."""

    clip_tokenizer: CLIPTokenizer | None = field(repr=False)
    t5_tokenizer: T5Tokenizer | None = field(repr=False)
    clip: CLIPText | None = field(repr=False)
    t5: T5 | None = field(repr=False)
    mmdit: MMDiT = field(repr=False)
    autoencoder: Autoencoder | None = field(repr=False)
    config: FluxConfig
    siglip: SigLIP | None = field(default=None, repr=False)
    redux: ReduxEmbedder | None = field(default=None, repr=False)
    image_encoder: CLIPVision | None = field(default=None, repr=False)
    ip_adapters: tuple[nn.Module, ...] = field(default=(), repr=False)
    # What `adapters/lora.py` needs to change or undo its LoRAs.
    loras: object = field(default=None, repr=False)
