"""The content filters. Oracles: transformers' classifier, processors and Pixtral put together as the original does; by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference import small_pipeline
from reference_vision import small_pixtral, small_vit, tokenizer
from transformers import PixtralImageProcessorPil, ViTImageProcessorPil

from miniflux import (
    control,
    fill,
    generate,
    image_to_image,
    inpaint,
    kontext_edit,
    kontext_inpaint,
    load,
)
from miniflux.safety.filters import (
    ABOUT_PICTURE,
    ABOUT_TEXT,
    AFTER_PICTURE,
    Filters,
    is_flagged,
    load_filters,
    says_yes,
    show,
    stop_flagged,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("classifier"), tmp_path_factory.mktemp("pixtral")


@pytest.fixture(scope="module")
def theirs(folders):
    return small_vit(folders[0]), small_pixtral(folders[1])


@pytest.fixture(scope="module")
def filters(folders, theirs):
    return load_filters(*folders, device="cpu")


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Scripted(torch.nn.Module):
    """A network that answers what it is told to, and counts how often it is asked."""

    def __init__(self, net, answers):
        super().__init__()
        self.config, self.answers, self.asked = net.config, answers, 0
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, *inputs):
        self.asked += 1
        return torch.tensor(self.answers)[None]


def scripted(filters: Filters, nsfw: float, yes: float) -> Filters:
    """nsfw: the probability; yes: the logit, beside 0 for no."""
    answers = [0.0] * filters.pixtral.config.vocab_size
    answers[filters.tokenizer.encode("yes")[0]] = yes
    answers[filters.tokenizer.encode("no")[0]] = 0.0
    return replace(filters, classifier=Scripted(filters.classifier, [float(np.log(1 - nsfw)), float(np.log(nsfw))]),
                   pixtral=Scripted(filters.pixtral, answers))


@pytest.mark.parametrize("nsfw, yes, flagged, asked", [
    (0.86, -1.0, True, 0),                                 # the classifier alone, and Pixtral is not asked any more
    (0.84, -1.0, False, 1),
    (0.84, 1.0, True, 1),
    (0.10, -1.0, False, 1),
])
def test_the_classifier_comes_first_and_flags_above_085(filters, nsfw, yes, flagged, asked):
    told = scripted(filters, nsfw, yes)
    assert is_flagged(photo(40, 30), told) is flagged and told.pixtral.asked == asked and told.classifier.asked == 1


@pytest.mark.parametrize("yes, flagged", [(1.0, True), (-1.0, False)])
def test_a_text_is_only_asked_about(filters, yes, flagged):
    told = scripted(filters, 0.99, yes)
    assert is_flagged("a fox", told) is flagged and told.classifier.asked == 0


def test_a_broken_score_or_answer_flags(filters):
    assert is_flagged(photo(8, 8), replace(filters, classifier=Scripted(filters.classifier, [float("nan")] * 2)))
    assert is_flagged("a fox", scripted(filters, 0.1, float("nan"))) and is_flagged(photo(8, 8), scripted(filters, 0.1, float("nan")))
    with pytest.raises(ValueError, match="expected uint8, or floats in"):
        stop_flagged(filters)(torch.full((1, 3, 32, 32), torch.nan))


def test_every_picture_of_a_batch_is_looked_at(filters):
    """The original looks at the first one only."""
    class Bright(Scripted):
        def forward(self, x):
            self.asked += 1
            return torch.tensor([[0.0, 9.0 if x.mean() > 0 else -9.0]])

    told = Filters(Bright(filters.classifier, []))
    black, white = torch.zeros(3, 32, 32), torch.ones(3, 32, 32)
    assert not is_flagged(torch.stack([black, black]), told) and is_flagged(torch.stack([black, white]), told)
    assert is_flagged([photo(8, 8), Image.new("RGB", (9, 9), "white")], told)
    assert torch.equal(stop_flagged(told)(black[None]), black[None])
    with pytest.raises(ValueError, match="picture 2 of 2 was stopped by the content filter"):
        stop_flagged(told)(torch.stack([black, white]))


@pytest.mark.parametrize("size", [(32, 32), (50, 40), (300, 200)])
def test_the_classifiers_scores_are_those_of_transformers(filters, theirs, size):
    from miniflux.safety import filters as safety
    picture = photo(*size)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    expected = float(theirs[0](**processor(picture, return_tensors="pt")).logits.softmax(-1)[0, 1])
    for threshold, flagged in ((expected - 1e-4, True), (expected + 1e-4, False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(safety, "THRESHOLD", threshold)
            assert is_flagged(picture, Filters(filters.classifier)) is flagged


@pytest.mark.parametrize("size", [(100, 100), (2000, 1000), (300, 1000), (640, 31), (3, 2), (517, 509)])
def test_pixtral_sees_what_its_processor_would_show_it(size):
    picture = photo(*size)
    scale = (512 ** 2 / (size[0] * size[1])) ** 0.5
    resized = picture.resize((int(scale * size[0]), int(scale * size[1])))
    expected = PixtralImageProcessorPil()(resized, return_tensors="pt")["pixel_values"]
    assert show(picture, 16).shape == expected.shape and (show(picture, 16) - expected).abs().max() < 1e-5


def test_even_a_picture_of_one_row_is_shown():
    assert show(photo(1, 4000), 16).shape == (1, 3, 1024, 16)


def test_the_answers_are_those_of_transformers(filters, theirs):
    """The whole question: control tokens by the tokenizers library, where they are typed into a text."""
    net, words, answers = theirs[1], tokenizer(), []
    yes, no = (words.encode(word).ids[0] for word in ("yes", "no"))
    for seed in range(12):
        picture = photo(20 + seed, 20, seed)
        pixels = show(picture, 16)
        rows, columns = pixels.shape[-2] // 16, pixels.shape[-1] // 16
        image = ("[IMG]" * columns + "[IMG_BREAK]") * rows
        ids = words.encode(f"<s>[INST]{ABOUT_PICTURE}{image.removesuffix('[IMG_BREAK]')}[IMG_END]{AFTER_PICTURE}[/INST]").ids
        logits = net(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1]
        ids = words.encode(f"<s>[INST]{ABOUT_TEXT.format(text='a fox' * seed)}[/INST]").ids
        about = net(input_ids=torch.tensor([ids])).logits[0, -1]
        assert says_yes(filters, [ABOUT_PICTURE, picture, AFTER_PICTURE]) is bool(logits[yes] > logits[no])
        assert is_flagged("a fox" * seed, filters) is bool(about[yes] > about[no])
        answers += [bool(logits[yes] > logits[no]), bool(about[yes] > about[no])]
    assert set(answers) == {True, False}                   # else nothing was compared


def test_a_missing_filter_is_an_error_and_never_a_picture(filters, folders, tmp_path):
    with pytest.raises(ValueError, match="texts are looked at by Pixtral, which is not among these filters"):
        is_flagged("a fox", Filters(filters.classifier))
    with pytest.raises(FileNotFoundError, match="'nowhere' is neither a folder nor a Hub id: expected one such as Falconsai/nsfw"):
        load_filters("nowhere")
    with pytest.raises(FileNotFoundError, match="expected one such as mistral-community/pixtral-12b"):
        load_filters(folders[0], tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="the image nowhere.png does not exist"):
        is_flagged(Path("nowhere.png"), filters)


def test_a_classifier_of_other_things_and_a_tokenizer_that_does_not_fit_are_refused(folders, theirs, tmp_path):
    small_vit(tmp_path / "cats", id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    with pytest.raises(ValueError, match="sorts pictures into cat, dog: expected a label nsfw"):
        load_filters(tmp_path / "cats", device="cpu")
    small_pixtral(tmp_path / "other")
    tokenizer(700).save(str(tmp_path / "other" / "tokenizer.json"))
    with pytest.raises(ValueError, match="does not fit its model"):
        load_filters(folders[0], tmp_path / "other", device="cpu")
    words = (tmp_path / "other" / "tokenizer.json").read_text().replace("[IMG_END]", "[IMG_STOP]")
    (tmp_path / "other" / "tokenizer.json").write_text(words)
    with pytest.raises(ValueError, match=r"lacks one of <s>, \[INST\]"):
        load_filters(folders[0], tmp_path / "other", device="cpu")


# ------------------------------------------------------------------------------------------------------------ on_finish


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {n: load(small_pipeline(tmp_path_factory.mktemp("flux") / f"flux{n}", in_channels=n), device="cpu") for n in (64, 128, 384)}


HOLE = Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), 16))
TASKS = {
    "generate": (64, lambda flux, **k: generate(flux, "owl", **k)),
    "image_to_image": (64, lambda flux, **k: image_to_image(flux, "owl", photo(48, 48), **k)),
    "inpaint": (64, lambda flux, **k: inpaint(flux, "owl", photo(48, 48), HOLE, mask_padding=2, **k)),
    "fill": (384, lambda flux, **k: fill(flux, "owl", photo(48, 48), HOLE, paste_back=True, **k)),
    "control": (128, lambda flux, **k: control(flux, "owl", photo(48, 48), **k)),
    "kontext_edit": (64, lambda flux, **k: kontext_edit(flux, "owl", photo(48, 48), auto_resize=False, **k)),
    "kontext_inpaint": (64, lambda flux, **k: kontext_inpaint(flux, "owl", photo(48, 48), HOLE, auto_resize=False, **k)),
}


@pytest.mark.parametrize("task", TASKS)
def test_on_finish_sees_what_is_returned_and_has_the_last_word(models, task):
    channels, paint = TASKS[task]
    keywords, seen = dict(width=48, height=48, steps=1, max_text_tokens=8, progress=False, num_images=2, output="tensor"), []

    def darken(pictures):
        seen.append(pictures)
        return pictures / 2

    plain, dark = paint(models[channels], **keywords), paint(models[channels], on_finish=darken, **keywords)
    assert len(seen) == 1 and torch.equal(seen[0], plain) and torch.equal(dark, plain / 2) and plain.shape == (2, 3, 48, 48)


def test_a_flagged_picture_is_never_returned(models, filters):
    keywords = dict(width=32, height=32, steps=1, max_text_tokens=8, progress=False)
    with pytest.raises(ValueError, match="picture 1 of 1 was stopped by the content filter"):
        generate(models[64], "owl", on_finish=stop_flagged(scripted(filters, 0.9, -1.0)), **keywords)
    assert len(generate(models[64], "owl", on_finish=stop_flagged(scripted(filters, 0.1, -1.0)), **keywords)) == 1
    with pytest.raises(ValueError, match='on_finish is given images, and output="latents" asks for none'):
        generate(models[64], "owl", on_finish=stop_flagged(filters), output="latents", **keywords)


@pytest.mark.parametrize("flag", ["image", "control_image", "canny", "depth", "ip_image", "negative_ip_image", "reference"])
def test_every_picture_that_a_flag_names_is_looked_at(monkeypatch, flag):
    """By hand: a filter that flags everything is asked about this very file."""
    from argparse import Namespace

    from miniflux import cli
    from miniflux.safety import filters as safety
    asked = []
    monkeypatch.setattr(safety, "load_filters", lambda *paths, device: Filters(None))
    monkeypatch.setattr(safety, "is_flagged", lambda picture, filters: asked.append(picture) or True)
    args = Namespace(safety=["classifier"], device=None, watermark=False, prompt="", **{flag: ["a.png"] if "ip" in flag else "a.png"})
    with pytest.raises(ValueError, match="the image a.png was stopped by the content filter"):
        cli.on_finish(args)
    assert asked == [Path("a.png")]
