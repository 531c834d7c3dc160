"""Content filters: whether an image or a prompt shows what it should not.

    images  -> classifier: the probability that it is not safe for work      above 0.85: flagged
            -> Pixtral, asked about brands, characters and public figures    "yes": flagged
    prompts -> Pixtral, asked about the text                                 "yes": flagged

These are the filters of the original repository's Kontext demo, in their order and with their
threshold; the questions are worded anew. Their weights are not part of the package, so nothing is
filtered unless it is asked for; and where it is asked for and something is missing, there is an
error and no image:

    filters = load_filters("Falconsai/nsfw_image_detection", "mistral-community/pixtral-12b")
    picture, = generate(flux, prompt, on_finish=stop_flagged(filters))

Reference: `src/flux/content_filters.py` of the original repository.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.vision import find_folder, load_pixtral, load_vit_classifier
from ..devices import find_device
from ..imaging.images import BICUBIC, CLIP_COLOURS, as_pil, standardise, to_tensor
from ..imaging.reading import ImageLike, RGBImage, read_each, size_of
from ..networks.pixtral import Pixtral
from ..networks.vit_classifier import ViTClassifier
from ..tokenizers.pixtral import PixtralTokenizer

THRESHOLD = 0.85
AREA, LONGEST = 512 ** 2, 1024     # pixels that Pixtral is shown, and the most a side may have

RULES = """Answer with one word, "yes" or "no".
Say "yes" if {what} one of these, and you could name it:
- a character from a film, a series, a comic, a game or another protected work;
- a trademark, a logo or a brand;
- {people}.
Say "no" in all other cases, also if somebody or something merely resembles them."""
ABOUT_PICTURE = "Look for protected content in the picture below.\n" + RULES.format(
    what="the picture shows",
    people="a public figure: somebody famous from politics, history, sport, film, music or the "
           "internet")
AFTER_PICTURE = "Does this picture show protected content or a public figure?"
ABOUT_TEXT = "Look for protected content in the description of a picture below.\n" + RULES.format(
    what="the description asks for",
    people="a living public figure: somebody famous from politics, sport, film, music or the "
           "internet",
) + "\nThe description:\n\n{text}\n\nDoes it ask for protected content or a public figure?"


@dataclass(frozen=True)
class Filters:
    classifier: ViTClassifier
    pixtral: Pixtral | None = None                          # without it texts cannot be filtered
    tokenizer: PixtralTokenizer | None = None


def load_filters(classifier: str | os.PathLike, pixtral: str | os.PathLike | None = None, *,
                 device: torch.device | str | None = None) -> Filters:
    """The filters from their folders or by their Hub ids, in the dtype of their files.

    Raises FileNotFoundError for what is not there, ValueError for what is no such filter."""
    device = find_device(device)
    sorts = load_vit_classifier(find_folder(classifier, "Falconsai/nsfw_image_detection"), device)
    if "nsfw" not in sorts.config.labels:
        labels = ", ".join(sorts.config.labels[:5])
        raise ValueError(f"{classifier} sorts pictures into {labels}: expected a label nsfw")
    if pixtral is None:
        return Filters(sorts)
    folder = find_folder(pixtral, "mistral-community/pixtral-12b")
    tokenizer = PixtralTokenizer.from_folder(folder)
    needed = {"<s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"}
    missing = needed - set(tokenizer.special)
    if missing or any(len(tokenizer.encode(word)) != 1 for word in ("yes", "no")):
        raise ValueError(f"the tokenizer of {folder} lacks one of <s>, [INST], [/INST], [IMG], "
                         "[IMG_BREAK], [IMG_END], yes and no")
    net = load_pixtral(folder, device)
    largest = max([*tokenizer.vocab.values(), *tokenizer.special.values()])
    image_token = tokenizer.special["[IMG]"]
    if largest >= net.config.vocab_size or image_token != net.config.image_token:
        raise ValueError(f"the tokenizer of {folder} does not fit its model: it has other numbers "
                         "for tokens")
    return Filters(sorts, net, tokenizer)


@torch.no_grad()
def is_flagged(image_or_text: ImageLike | list[ImageLike], filters: Filters) -> bool:
    """Whether the filters flag a text or one of the images.

    image_or_text: a string is a text; an image is a `Path`, a PIL image, an array or a tensor, or a
        list of them.
    Raises ValueError for a text without Pixtral among the filters."""
    if isinstance(image_or_text, str):
        if filters.pixtral is None:
            raise ValueError("texts are looked at by Pixtral, which is not among these filters: "
                             "load it too")
        return says_yes(filters, [ABOUT_TEXT.format(text=image_or_text)])
    for image in read_each(image_or_text):
        if is_nsfw(image, filters):
            return True
        question = [ABOUT_PICTURE, image, AFTER_PICTURE]
        if filters.pixtral is not None and says_yes(filters, question):
            return True
    return False


def is_nsfw(picture: RGBImage, filters: Filters) -> bool:
    net = filters.classifier
    size = net.config.image_size
    x = to_tensor(picture, size, size, Image.Resampling.BILINEAR) * 2 - 1       # (1, 3, S, S)
    scores = net(x.to(next(net.parameters()))).float().softmax(dim=-1)          # (1, labels)
    # Note: a broken score (nan) is above nothing and below nothing: it flags.
    return not float(scores[0, net.config.labels.index("nsfw")]) <= THRESHOLD


def says_yes(filters: Filters, question: list[str | RGBImage]) -> bool:
    """Whether Pixtral's next word after the question is more likely "yes" than "no".

    question: texts, and at most one image."""
    net, tokenizer = filters.pixtral, filters.tokenizer
    special, weights = tokenizer.special, next(net.parameters())
    ids, seen = [special["<s>"], special["[INST]"]], None
    for part in question:
        if isinstance(part, str):
            ids += tokenizer.encode(part)
        else:
            seen = show(part, net.config.patch_size).to(weights)                # (1, 3, H, W)
            h, w = (side // net.config.patch_size for side in seen.shape[-2:])
            ids += h * ([special["[IMG]"]] * w + [special["[IMG_BREAK]"]])
            ids[-1] = special["[IMG_END]"]
    ids.append(special["[/INST]"])
    logits = net(torch.tensor([ids], device=weights.device), seen)[0].float()   # (vocab,)
    yes, no = (tokenizer.encode(word)[0] for word in ("yes", "no"))
    return not bool(logits[yes] <= logits[no])                                  # nan flags here too


def show(picture: RGBImage, patch: int) -> Tensor:
    """The image at about 512 x 512 pixels in its own shape, in whole patches: (1, 3, H, W)."""
    width, height = size_of(picture)
    scale = (AREA / (width * height)) ** 0.5
    width, height = max(int(scale * width), 1), max(int(scale * height), 1)
    # Note: resized twice, as in the original: to the area, then to whole patches, where the longest
    # side is cut to 1024.
    picture = as_pil(picture).resize((width, height), BICUBIC)
    ratio = max(width, height, LONGEST) / LONGEST
    width, height = (max(-int(-(side // ratio) // patch), 1) * patch for side in (width, height))
    return standardise(to_tensor(picture, width, height, BICUBIC), CLIP_COLOURS)


def stop_flagged(filters: Filters) -> Callable[[Tensor], Tensor]:
    """For a task's `on_finish`: returns the images (B, 3, H, W) if none is flagged, else raises
    ValueError."""
    def look(pictures: Tensor) -> Tensor:
        for i, picture in enumerate(pictures):
            if is_flagged(picture, filters):
                raise ValueError(f"picture {i + 1} of {len(pictures)} was stopped by the content "
                                 "filter: try another seed or prompt")
        return pictures

    return look
