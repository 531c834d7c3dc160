"""Small models of the reference libraries with random weights: what miniflux must equal.

Every parameter gets a value that matters, norm scales and biases included: a fresh model has ones
and zeros there, and a forgotten bias or two swapped norms would pass. A missing library is an
error, never a skipped test.

    transformer, vae, clip, t5    a reference model with random weights
    clip_state, t5_state          its state under the names of the published checkpoints
    small_pipeline                a whole FluxPipeline in a folder, tokenizers and all
"""

import json
import shutil
from pathlib import Path

import sentencepiece
import tokenizers
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxPipeline,
    FluxPriorReduxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from miniflux.tokenizers.bpe import byte_symbols
from miniflux.tokenizers.files import read_spiece_model

EXTRA_IDS = 4


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Matrices keep the size of their input; norm scales lie around one, biases around zero."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tables = {id(embedding.weight) for embedding in embeddings}
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise if id(p) in tables else noise / p[0].numel() ** 0.5)
            else:
                p.copy_(1 + 0.2 * noise if name.endswith("weight") else 0.2 * noise)
    return model.eval()


def transformer(
    guidance: bool = True,
    in_channels: int = 64,
    seed: int = 0,
    layers: tuple[int, int] = (2, 3),
    joint: int = 32,
    pooled: int = 24,
) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        out_channels=64,
        num_layers=layers[0],
        num_single_layers=layers[1],
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=joint,
        pooled_projection_dim=pooled,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    return randomise(model, seed)


def vae(
    widths: tuple[int, ...] = (8, 16, 24, 24),
    groups: int = 4,
    blocks: int = 1,
    seed: int = 1,
    sample_size: int = 32,
) -> AutoencoderKL:
    model = AutoencoderKL(
        sample_size=sample_size,
        block_out_channels=widths,
        layers_per_block=blocks,
        norm_num_groups=groups,
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    return randomise(model, seed)


def clip(vocab_size: int = 600, hidden: int = 24, seed: int = 2) -> CLIPTextModel:
    """eos_token_id is 2, as in the official config: CLIP then pools at the largest id."""
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden + 1,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="quick_gelu",
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return randomise(CLIPTextModel(config), seed)


def t5(vocab_size: int = 300, d_model: int = 32, seed: int = 3) -> T5EncoderModel:
    """d_kv · num_heads differs from d_model, so that the two cannot be confused."""
    config = T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=12,
        num_heads=4,
        d_ff=50,
        num_layers=3,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    model = randomise(T5EncoderModel(config), seed)
    with torch.no_grad():
        for block in model.encoder.block:                   # T5 learns its 1/√d_kv
            block.layer[0].SelfAttention.q.weight /= 12 ** 0.5
    return model


def siglip(hidden: int = 24, patches: int = 3, seed: int = 4) -> SiglipVisionModel:
    """Images of 26 x 26 in patches of 8: as in the official model, some pixels are left over."""
    config = SiglipVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden + 1,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=8 * patches + 2,
        patch_size=8,
    )
    return randomise(SiglipVisionModel(config), seed)


def clip_vision(
    hidden: int = 24, patches: int = 3, seed: int = 8
) -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden + 1,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=8 * patches + 2,
        patch_size=8,
        projection_dim=20,
        hidden_act="quick_gelu",
    )
    return randomise(CLIPVisionModelWithProjection(config), seed)


def controlnet(
    layers: tuple[int, int] = (1, 2),
    modes: int | None = None,
    hint: bool = False,
    guidance: bool = True,
    seed: int = 6,
) -> FluxControlNetModel:
    """A ControlNet of InstantX's kind, or with `hint` of XLabs', for the small pipeline."""
    model = FluxControlNetModel(
        patch_size=1,
        in_channels=64,
        num_layers=layers[0],
        num_single_layers=layers[1],
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
        num_mode=modes,
        conditioning_embedding_channels=16 if hint else None,
    )
    net = randomise(model, seed)
    if hint:
        # The patches of the convolutions' result; the transformer's own patch_size is 1.
        net.register_to_config(patch_size=2)
    return net


def ip_adapter_state(
    depth: int = 2,
    tokens: int = 4,
    joint: int = 32,
    hidden: int = 48,
    vectors: int = 20,
    seed: int = 9,
) -> dict[str, Tensor]:
    """An IP-Adapter under XLabs' names, for the small pipeline."""
    shapes = {
        "ip_adapter_proj_model.proj.weight": (tokens * joint, vectors),
        "ip_adapter_proj_model.proj.bias": (tokens * joint,),
        "ip_adapter_proj_model.norm.weight": (joint,),
        "ip_adapter_proj_model.norm.bias": (joint,),
    }
    for i in range(depth):
        for kind in ("k", "v"):
            name = f"double_blocks.{i}.processor.ip_adapter_double_stream_{kind}_proj"
            shapes[f"{name}.weight"] = (hidden, joint)
            shapes[f"{name}.bias"] = (hidden,)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        state[name] = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    return state


def clip_state(model: CLIPTextModel) -> dict[str, Tensor]:
    """Note: transformers 5 drops the leading `text_model.` in memory; the files keep it."""
    return {
        "text_model." + name.removeprefix("text_model."): tensor
        for name, tensor in model.state_dict().items()
    }


def t5_state(model: T5EncoderModel) -> dict[str, Tensor]:
    """The files hold the shared embedding once."""
    state = dict(model.state_dict())
    state.pop("encoder.embed_tokens.weight", None)
    return state


# ----------------------------------------------------------------------------------- whole pipeline

WORDS = (
    "a red apple to the left of two small blue cats on a green background",
    "an owl at night, a pencil sketch!",
    "the yellow sun, a rocket and 3 large birds",
    "it's a café by the sea: 42 boats, photo of an old house",
)


def corpus(lines: int = 300) -> list[str]:
    """Sentences shuffled from WORDS: enough to learn a vocabulary from."""
    words = " ".join(WORDS).split()
    generator = torch.Generator().manual_seed(0)
    sentences = []
    for _ in range(lines):
        choice = torch.randint(len(words), (8,), generator=generator)
        sentences.append(" ".join(words[i] for i in choice))
    return sentences


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def train_clip_tokenizer(folder: Path, merges: int = 80) -> int:
    """Write vocab.json, merges.txt and tokenizer_config.json as CLIP has them.

    The vocabulary: bytes, bytes at the end of a word, merges, two special tokens. Returns its
    size."""
    folder.mkdir(parents=True)
    learner = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=200 + merges, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(" ".join(corpus()).split(), trainer)
    pairs = []
    for pair in json.loads(learner.to_str())["model"]["merges"]:
        pairs.append(pair.split(" ") if isinstance(pair, str) else pair)
    symbols = sorted(byte_symbols())
    pieces = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    pieces += dict.fromkeys(a + b for a, b in pairs)
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {piece: number for number, piece in enumerate(pieces)})
    lines = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs)
    (folder / "merges.txt").write_text(lines, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    })
    return len(pieces)


def train_t5_tokenizer(folder: Path, pieces: int = 120) -> int:
    """Write spiece.model, and tokenizer.json with the steps of T5's.

    Returns the size of the vocabulary."""
    folder.mkdir(parents=True)
    with open(folder / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()),
            model_writer=file,
            model_type="unigram",
            vocab_size=pieces,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    vocabulary, charsmap, _ = read_spiece_model(folder / "spiece.model")
    extra = [f"<extra_id_{i}>" for i in reversed(range(EXTRA_IDS))]
    vocabulary += [(piece, 0.0) for piece in extra if piece not in dict(vocabulary)]
    model = tokenizers.models.Unigram(vocabulary, unk_id=2, byte_fallback=False)
    fast = tokenizers.Tokenizer(model)
    normalizers = tokenizers.normalizers
    fast.normalizer = normalizers.Sequence([
        normalizers.Precompiled(charsmap),
        normalizers.Strip(left=False, right=True),
        normalizers.Replace(tokenizers.Regex(" {2,}"), "▁"),
    ])
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    fast.add_special_tokens(["<pad>", "</s>", "<unk>", *extra])
    fast.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": 512,
        "extra_ids": EXTRA_IDS,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "additional_special_tokens": sorted(extra),
    })
    return len(vocabulary)


def small_pipeline(
    folder: Path,
    guidance: bool = True,
    in_channels: int = 64,
    sample_size: int = 32,
    layers: tuple[int, int] = (2, 3),
) -> Path:
    """A whole FLUX.1 in the diffusers layout, in float32; returns the folder.

    guidance: dev's form with guidance, or schnell's without."""
    folder = Path(folder)
    clip_tokens = train_clip_tokenizer(folder / "tokenizer")
    t5_tokens = train_t5_tokenizer(folder / "tokenizer_2")
    text_encoder = clip(clip_tokens)
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0 if guidance else 1.0,
        use_dynamic_shifting=guidance,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    pipeline = FluxPipeline(
        scheduler=scheduler,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=T5Tokenizer.from_pretrained(folder / "tokenizer_2"),
        text_encoder=text_encoder,
        text_encoder_2=t5(t5_tokens + 3),       # the official T5 has spare rows, too
        vae=vae(sample_size=sample_size),
        transformer=transformer(guidance, in_channels, layers=layers),
    )
    pipeline.save_pretrained(folder)
    # The files that transformers 5 writes differ from the official ones: restore the official form.
    file = folder / "text_encoder" / "model.safetensors"
    save_file(clip_state(text_encoder), file, metadata={"format": "pt"})
    for name, train in (("tokenizer", train_clip_tokenizer), ("tokenizer_2", train_t5_tokenizer)):
        shutil.rmtree(folder / name)
        train(folder / name)
    return folder


def small_redux(folder: Path, seed: int = 5) -> Path:
    """A whole Redux in the diffusers layout, for the small pipeline; returns the folder."""
    tower = siglip()
    size = tower.config.image_size
    embedder = ReduxImageEncoder(redux_dim=tower.config.hidden_size, txt_in_features=32)
    pipeline = FluxPriorReduxPipeline(
        image_encoder=tower,
        feature_extractor=SiglipImageProcessor(size={"height": size, "width": size}),
        image_embedder=randomise(embedder, seed),
    )
    pipeline.save_pretrained(folder)
    # The published form of the names.
    state = {
        "vision_model." + name.removeprefix("vision_model."): tensor
        for name, tensor in tower.state_dict().items()
    }
    file = folder / "image_encoder" / "model.safetensors"
    save_file(state, file, metadata={"format": "pt"})
    return folder
