"""Small vision models of transformers with random weights.

The depth estimator and the safety filters must equal them.

    small_depth     DepthAnythingForDepthEstimation
    small_vit       ViTForImageClassification with the labels normal and nsfw
    small_pixtral   LlavaForConditionalGeneration: Pixtral's vision tower, Mistral, a tokenizer
    tokenizer       byte-level BPE over Mistral's pieces, trained on a few lines, with Pixtral's
                    control tokens
"""

from pathlib import Path

from reference import randomise
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    ViTConfig,
    ViTForImageClassification,
)

# As in the tokenizer.json of mistral-community/pixtral-12b.
MISTRAL_PIECES = "|".join((
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"\p{N}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
))
CONTROL = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL]", "[A]", "[B]", "[C]", "[D]", "[IMG]",
    "<pad>", "[IMG_BREAK]", "[IMG_END]",
]


def small_depth(
    folder: Path, backbone: dict | None = None, **values
) -> DepthAnythingForDepthEstimation:
    """The network; it is also saved into the folder."""
    dino = dict(
        hidden_size=24,
        num_hidden_layers=5,
        num_attention_heads=3,
        image_size=70,
        patch_size=14,
        out_indices=[1, 2, 4, 5],
        reshape_hidden_states=False,
    )
    head = dict(
        backbone_config=Dinov2Config(**(dino | (backbone or {}))),
        reassemble_hidden_size=24,
        neck_hidden_sizes=[4, 8, 12, 16],
        fusion_hidden_size=8,
        head_hidden_size=4,
        patch_size=14,
    )
    net = DepthAnythingForDepthEstimation(DepthAnythingConfig(**(head | values)))
    randomise(net, seed=8).save_pretrained(folder)
    return net


def small_vit(folder: Path, **values) -> ViTForImageClassification:
    """The network; it is also saved into the folder."""
    sizes = dict(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=32,
        patch_size=8,
        id2label={0: "normal", 1: "nsfw"},
        label2id={"normal": 0, "nsfw": 1},
    )
    net = ViTForImageClassification(ViTConfig(**(sizes | values)))
    randomise(net, seed=9).save_pretrained(folder)
    return net


def tokenizer(vocab_size: int = 600, ignore_merges: bool = False) -> Tokenizer:
    bpe = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(MISTRAL_PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    text = Path(__file__).read_text()
    text += "yes\nno\n" * 200
    text += "Yes No A fox's 10 red apples, 北京 Ünïcode ... \n\n  if (x): return/\n" * 20
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in CONTROL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text.splitlines(keepends=True), trainer)
    return bpe


def small_pixtral(
    folder: Path, text: dict | None = None, vision: dict | None = None
) -> LlavaForConditionalGeneration:
    """The network; it is also saved into the folder, with its tokenizer.

    The image token is the tokenizer's [IMG]."""
    tower = dict(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=16,
        image_size=64,
        hidden_act="silu",
    )
    mistral = dict(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=600,
        sliding_window=None,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
    )
    net = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=PixtralVisionConfig(**(tower | (vision or {}))),
        text_config=MistralConfig(**(mistral | (text or {}))),
        image_token_index=CONTROL.index("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ))
    randomise(net, seed=10).save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    return net
