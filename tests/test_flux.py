"""`load`: one small random pipeline comes out the same from every layout, and what is no FLUX.1 is
refused in one sentence.

Oracle of the parameters: the reference models that wrote the folder, bit for bit.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from reference import clip, clip_state, small_pipeline, t5, t5_state, transformer, vae
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from miniflux import load
from miniflux.checkpoints.names import autoencoder_from_diffusers, mmdit_from_diffusers
from miniflux.devices import find_device
from miniflux.flux import SCHEDULES, FluxConfig, Schedule

NETWORKS = ("mmdit", "autoencoder", "clip", "t5")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch) -> Path:
    """No test sees this machine's cache, or reaches for the Hub."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return tmp_path / "hub"


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Path:
    return small_pipeline(tmp_path_factory.mktemp("pristine") / "flux")


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    """A small pipeline that the test may spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "flux"))


@pytest.fixture
def original(pristine, tmp_path) -> Path:
    """The same pipeline in the original layout, with the official autoencoder's 32 groups."""
    folder = tmp_path / "original"
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(pristine / name, folder / name)
    state = load_file(pristine / "transformer" / "diffusion_pytorch_model.safetensors")
    save(folder / "flux1-small.safetensors", mmdit_from_diffusers(state))
    save(
        folder / "ae.safetensors", autoencoder_from_diffusers(vae((32, 32), groups=32).state_dict())
    )
    return folder


def save(path: Path, state: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    return path


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def same(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(match: str, source, error=ValueError, **keywords) -> None:
    """`load` refuses the source in one line that matches."""
    with pytest.raises(error, match=match) as caught:
        load(source, device="cpu", **keywords)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


# --------------------------------------------------------------------------------------- what loads


def test_a_diffusers_folder_holds_the_reference_models(small_folder):
    flux = load(small_folder, device="cpu")
    theirs = {
        "mmdit": mmdit_from_diffusers(
            FluxTransformer2DModel.from_pretrained(small_folder / "transformer").state_dict()
        ),
        "autoencoder": autoencoder_from_diffusers(
            AutoencoderKL.from_pretrained(small_folder / "vae").state_dict()
        ),
        "clip": load_file(small_folder / "text_encoder" / "model.safetensors"),
        "t5": load_file(small_folder / "text_encoder_2" / "model.safetensors"),
    }
    for name, state in theirs.items():
        ours = getattr(flux, name).state_dict()
        assert ours.keys() == state.keys() - {"encoder.embed_tokens.weight"}
        assert all(torch.equal(tensor, state[key]) for key, tensor in ours.items())
    assert len(flux.clip_tokenizer.vocab) == flux.clip.config.vocab_size
    assert flux.t5_tokenizer.max_length == 512


def test_the_settings_come_from_the_folder(small_folder):
    guided = small_folder.name == "dev"
    assert load(small_folder, device="cpu").config == FluxConfig(
        name=small_folder.name,
        size=json.loads((small_folder / "vae/config.json").read_text()).get("sample_size", 1024),
        max_text_tokens=512 if guided else 256,
        few_steps=not guided,
        schedule=Schedule(use_dynamic_shifting=guided, shift=3.0 if guided else 1.0),
    )


def test_a_sharded_folder_is_the_same(folder, pristine):
    """Shards so small that blocks, and the parts of one fused tensor, lie in different files."""
    shutil.rmtree(folder / "transformer"), shutil.rmtree(folder / "text_encoder_2")
    model = FluxTransformer2DModel.from_pretrained(pristine / "transformer")
    model.save_pretrained(folder / "transformer", max_shard_size="200KB")
    t5(load(pristine, device="cpu").t5.config.vocab_size).save_pretrained(
        folder / "text_encoder_2", max_shard_size="50KB"
    )
    assert len(list(folder.glob("*/*-of-*.safetensors"))) > 6
    a, b = load(folder, device="cpu"), load(pristine, device="cpu")
    assert all(same(getattr(a, name), getattr(b, name)) for name in NETWORKS)


def test_the_original_layout_is_the_same(original, pristine):
    a, b = load(original, device="cpu"), load(pristine, device="cpu")
    assert all(same(getattr(a, name), getattr(b, name)) for name in ("mmdit", "clip", "t5"))
    assert all(
        torch.equal(tensor, a.autoencoder.state_dict()[name])
        for name, tensor in autoencoder_from_diffusers(
            vae((32, 32), groups=32).state_dict()
        ).items()
    )
    assert a.clip_tokenizer.vocab == b.clip_tokenizer.vocab
    assert a.t5_tokenizer.pieces == b.t5_tokenizer.pieces
    assert a.config == FluxConfig(name="original", size=1024, max_text_tokens=512)


def test_loose_text_encoders_are_the_same(original, pristine):
    """`clip_l.safetensors` and `t5xxl_fp16.safetensors` as they lie beside ComfyUI's models, with
    their extra tensors."""
    tokens = (
        load(pristine, device="cpu").clip.config.vocab_size,
        load(pristine, device="cpu").t5.config.vocab_size,
    )
    shutil.rmtree(original / "text_encoder"), shutil.rmtree(original / "text_encoder_2")
    text, text2 = clip_state(clip(tokens[0], hidden=64)), t5_state(t5(tokens[1]))
    save(
        original / "clip_l.safetensors",
        text
        | {
            "logit_scale": torch.tensor(4.6),
            "text_projection.weight": torch.ones(64, 64),
            "text_model.embeddings.position_ids": torch.arange(77)[None],
        },
    )
    save(
        original / "t5xxl_fp16.safetensors",
        text2 | {"encoder.embed_tokens.weight": text2["shared.weight"]},
    )
    save(
        original / "flux1-small.safetensors",
        mmdit_from_diffusers(transformer(pooled=64).state_dict()),
    )
    flux = load(original, device="cpu")
    assert all(torch.equal(tensor, flux.clip.state_dict()[name]) for name, tensor in text.items())
    assert all(torch.equal(tensor, flux.t5.state_dict()[name]) for name, tensor in text2.items())


def test_the_same_picture_is_painted_from_both_layouts(original, pristine, tmp_path):
    """With everything equal but the files: heads of 16 in a single file are shared among the axes
    as 4, 6, 6 channels. Where the weights lie in memory may change how a processor sums, and so the
    last bits."""
    from miniflux import generate
    other = tmp_path / "other"
    shutil.copytree(pristine, other)
    change(other / "transformer/config.json", axes_dims_rope=[4, 6, 6])
    vae((32, 32), groups=32).save_pretrained(other / "vae")
    keywords = dict(
        width=64, height=48, steps=2, max_text_tokens=16, output="latents", progress=False
    )
    a, b = (generate(load(path, device="cpu"), "an owl", **keywords) for path in (original, other))
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()


@pytest.mark.parametrize("transformer_name, vae_name", [
    ("flux1-dev.safetensors", "ae.sft"), ("flux1-dev.sft", "ae.sft")])
def test_the_first_official_files_were_called_sft(original, transformer_name, vae_name):
    (original / "flux1-small.safetensors").rename(original / transformer_name)
    (original / "ae.safetensors").rename(original / vae_name)
    flux = load(original, device="cpu")
    assert flux.autoencoder and flux.mmdit.config.depth == 2


def test_the_files_of_a_variant_are_the_same(folder, pristine):
    """`variant="fp16"`, in one file and in shards. Oracle: the libraries that write them."""
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        shutil.rmtree(folder / name)
    model = FluxTransformer2DModel.from_pretrained(pristine / "transformer")
    model.save_pretrained(folder / "transformer", variant="fp16", max_shard_size="200KB")
    model = AutoencoderKL.from_pretrained(pristine / "vae")
    model.save_pretrained(folder / "vae", variant="fp16")
    flux = load(pristine, device="cpu")
    for name, network in (("text_encoder", clip(flux.clip.config.vocab_size)),
                          ("text_encoder_2", t5(flux.t5.config.vocab_size))):
        network.save_pretrained(folder / name, variant="fp16", max_shard_size="50KB")
    assert not list(folder.glob("*/model.safetensors")) and list(folder.glob("*/*.index*fp16*json"))
    again = load(folder, device="cpu")
    assert all(same(getattr(again, name), getattr(flux, name)) for name in NETWORKS)


def test_of_two_variants_none_is_chosen(folder):
    one = folder / "vae/diffusion_pytorch_model.safetensors"
    shutil.copy(one, folder / "vae/diffusion_pytorch_model.bf16.safetensors")
    one.rename(folder / "vae/diffusion_pytorch_model.fp16.safetensors")
    refused(
        "vae has the weights diffusion_pytorch_model.bf16.safetensors, .*fp16.*: leave one of them",
        folder,
    )


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_replaces_the_transformer(folder, tmp_path, prefix):
    """Bare, and as ComfyUI saves it, among tensors of other parts."""
    state = mmdit_from_diffusers(transformer(guidance=False, in_channels=128, seed=5).state_dict())
    strangers = {"vae.encoder.conv_in.weight": torch.ones(2)} if prefix else {}
    path = save(
        tmp_path / "other.safetensors",
        {prefix + name: tensor for name, tensor in state.items()} | strangers,
    )
    flux = load(folder, device="cpu", transformer=path)
    assert all(torch.equal(tensor, flux.mmdit.state_dict()[name]) for name, tensor in state.items())
    assert flux.mmdit.config.in_channels == 128 and same(
        flux.autoencoder, load(folder, device="cpu").autoencoder
    )


def test_another_transformer_keeps_the_schedule_of_the_folder(folder, tmp_path):
    """A de-distilled dev has no guidance embedding, but dev's shift, steps and number of tokens.
    Oracle: the folder's own model; diffusers keeps the folder's scheduler too."""
    state = mmdit_from_diffusers(transformer(guidance=False).state_dict())
    path = save(tmp_path / "de-distilled.safetensors", state)
    assert load(folder, device="cpu", transformer=path).config == load(folder, device="cpu").config


def test_the_schedule_can_be_asked_for(folder, tmp_path):
    """A schnell in dev's folder, and a de-distilled dev in a folder without a scheduler."""
    state = mmdit_from_diffusers(transformer(guidance=False).state_dict())
    path = save(tmp_path / "single.safetensors", state)
    config = load(folder, device="cpu", transformer=str(path), schedule="schnell").config
    assert config.schedule == SCHEDULES["schnell"]
    assert (config.few_steps, config.max_text_tokens) == (True, 256)
    shutil.rmtree(folder / "scheduler")
    assert load(folder, device="cpu", transformer=path).config.few_steps
    config = load(folder, device="cpu", transformer=path, schedule="dev").config
    assert config.schedule == Schedule()
    assert (config.few_steps, config.max_text_tokens) == (False, 512)
    own = Schedule(spacing="karras")
    assert load(folder, device="cpu", schedule=own).config.schedule == own
    refused("schedule is 'fast', expected 'dev', 'schnell' or a Schedule", folder, schedule="fast")


def test_another_scheduler_is_refused_unless_a_schedule_is_asked_for(folder):
    """diffusers builds the class of model_index.json."""
    change(folder / "model_index.json", scheduler=["diffusers", "FlowMatchHeunDiscreteScheduler"])
    refused(
        "model_index.json names the scheduler 'FlowMatchHeunDiscreteScheduler', expected Flow",
        folder,
    )
    assert load(folder, device="cpu", schedule="dev").config.schedule == Schedule()


def test_a_guided_transformer_does_not_take_schnells_schedule(tmp_path):
    """A fine-tuned dev put into schnell's folder."""
    schnell = small_pipeline(tmp_path / "schnell", guidance=False)
    path = save(tmp_path / "dev.safetensors", mmdit_from_diffusers(transformer().state_dict()))
    config = load(schnell, device="cpu", transformer=path).config
    assert config.schedule == Schedule() and not config.few_steps


def test_a_folder_replaces_the_transformer_too(folder, tmp_path):
    transformer(seed=9).save_pretrained(tmp_path / "finetuned")
    assert not same(
        load(folder, device="cpu", transformer=tmp_path / "finetuned").mmdit,
        load(folder, device="cpu").mmdit,
    )
    shutil.rmtree(folder / "transformer")
    assert load(folder, device="cpu", transformer=tmp_path / "finetuned").mmdit.config.depth == 2


def test_parts_that_a_folder_does_not_bring_are_none(folder):
    for name in ("text_encoder", "tokenizer_2", "vae", "scheduler"):
        shutil.rmtree(folder / name)
    flux = load(folder, device="cpu")
    assert flux.clip is None
    assert flux.t5_tokenizer is None
    assert flux.autoencoder is None
    assert flux.t5
    assert flux.clip_tokenizer
    assert flux.config == FluxConfig(name="flux", max_text_tokens=512)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_type_and_device_act_on_every_network(folder, dtype):
    flux = load(folder, device="cpu", dtype=dtype)
    for name in NETWORKS:
        assert {(p.dtype, p.device.type) for p in getattr(flux, name).parameters()} == {
            (dtype or torch.float32, "cpu")
        }
    meta = load(folder, device="meta")
    assert {(p.dtype, p.device.type) for p in meta.mmdit.parameters()} == {(torch.bfloat16, "meta")}


def test_folders_come_before_the_single_files_beside_them(folder):
    """As in the official repositories, which hold the transformer and the autoencoder twice."""
    (folder / "flux1-dev.safetensors").write_bytes(b"not to be read")
    (folder / "ae.safetensors").write_bytes(b"not to be read")
    assert load(folder, device="cpu").mmdit.config.depth == 2


def test_loading_does_not_import_the_reference_libraries(pristine):
    code = (
        "import sys; from miniflux import load; load(sys.argv[1], device='cpu'); "
        "names = {'diffusers', 'transformers', 'tokenizers', 'huggingface_hub'}; "
        "sys.exit(sorted(names & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code, str(pristine)], check=True)


# ---------------------------------------------------------------------------------------- the cache


def snapshot(cache: Path, repo: str) -> Path:
    path = cache / ("models--" + repo.replace("/", "--")) / "snapshots" / "abc"
    path.mkdir(parents=True)
    return path


def fill(path: Path, *sources: Path) -> None:
    for source in sources:
        shutil.copytree(source, path, dirs_exist_ok=True)


def test_single_files_take_their_text_encoders_from_the_cache(original, pristine, empty_cache):
    """Oracle: the same model loaded from its folder. The official encoders' repositories hold
    everything at the top level: a whole CLIP with its vision tower, a whole T5 with its decoder."""
    repo = snapshot(empty_cache, "black-forest-labs/FLUX.1-schnell")
    shutil.copy(original / "flux1-small.safetensors", repo / "flux1-schnell.safetensors")
    shutil.copy(original / "ae.safetensors", repo)
    (repo / "transformer").mkdir()  # other programs fetch the configs alone
    shutil.copy(pristine / "transformer/config.json", repo / "transformer")
    one, two = (
        snapshot(empty_cache, "openai/clip-vit-large-patch14"),
        snapshot(empty_cache, "google/t5-v1_1-xxl"),
    )
    (
        fill(one, pristine / "tokenizer", pristine / "text_encoder"),
        fill(two, pristine / "tokenizer_2", pristine / "text_encoder_2"),
    )
    save(one / "model.safetensors", load_file(one / "model.safetensors") | {
        "logit_scale": torch.tensor(1.0), "visual_projection.weight": torch.ones(2, 2),
        "vision_model.post_layernorm.weight": torch.ones(2)})
    text = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(
        json.dumps({"architectures": ["CLIPModel"], "projection_dim": 768, "text_config": text})
    )
    save(two / "model.safetensors", load_file(two / "model.safetensors") | {
        "lm_head.weight": torch.ones(2), "decoder.final_layer_norm.weight": torch.ones(2)})
    change(two / "config.json", architectures=["T5ForConditionalGeneration"])
    a, b = load("schnell", device="cpu"), load(pristine, device="cpu")
    assert all(same(getattr(a, name), getattr(b, name)) for name in ("mmdit", "clip", "t5"))
    assert a.autoencoder
    assert a.clip_tokenizer.vocab == b.clip_tokenizer.vocab
    assert a.t5_tokenizer.pieces == b.t5_tokenizer.pieces
    assert a.config.name == "schnell"


def test_a_cached_tokenizer_without_weights_brings_the_tokenizer_alone(
    original, pristine, empty_cache
):
    """Other programs fetch only the tokenizer from the encoder's repository."""
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(original / name)
    assert load(original, device="cpu").clip_tokenizer is None
    fill(snapshot(empty_cache, "openai/clip-vit-large-patch14"), pristine / "tokenizer")
    flux = load(original, device="cpu")
    assert flux.clip_tokenizer and flux.clip is None and flux.t5 is None


def test_a_cached_text_encoder_in_a_pickle_is_refused(original, pristine, empty_cache):
    shutil.rmtree(original / "text_encoder_2"), shutil.rmtree(original / "tokenizer_2")
    path = snapshot(empty_cache, "google/t5-v1_1-xxl")
    fill(path, pristine / "tokenizer_2")
    (
        shutil.copy(pristine / "text_encoder_2/config.json", path),
        torch.save({}, path / "pytorch_model.bin"),
    )
    refused(
        "pytorch_model.bin is a pickle, which can run any code when it is opened: convert",
        original,
    )


def test_a_folder_of_the_diffusers_layout_takes_nothing_from_the_cache(
    folder, pristine, empty_cache
):
    fill(
        snapshot(empty_cache, "openai/clip-vit-large-patch14"),
        pristine / "tokenizer",
        pristine / "text_encoder",
    )
    shutil.rmtree(folder / "text_encoder")
    assert load(folder, device="cpu").clip is None


# ---------------------------------------------------------------------------------- what is refused


def test_a_source_that_is_not_there_is_refused(tmp_path):
    refused(
        "'.*/nothing' is neither a folder nor a known model: expected .*schnell, dev, .*a Hub id",
        tmp_path / "nothing",
        FileNotFoundError,
    )
    refused("'tinny' is neither a folder nor a known model", "tinny", FileNotFoundError)
    refused("someone/model is not in .*pip install", "someone/model", FileNotFoundError)


def test_a_folder_without_a_model_is_refused(tmp_path):
    refused(
        r"holds no FLUX.1 model: it has no folder transformer/ .* or file flux1-\*.safetensors",
        tmp_path,
    )


def test_a_file_is_no_source(original):
    refused(
        "flux1-small.safetensors is a file without a whole model: load a folder, and give",
        original / "flux1-small.safetensors",
    )


def test_a_transformer_that_is_not_there_is_refused(folder):
    refused(
        "the transformer nowhere.safetensors does not exist",
        folder,
        FileNotFoundError,
        transformer="nowhere.safetensors",
    )


def test_several_transformers_in_a_folder_have_to_be_chosen_from(original):
    shutil.copy(original / "flux1-small.safetensors", original / "flux1-a.safetensors")
    refused(
        "has the transformers flux1-a.safetensors, flux1-small.safetensors: choose",
        original,
    )
    assert load(original, device="cpu", transformer=original / "flux1-a.safetensors")


def test_other_models_are_refused(folder):
    change(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    refused(
        "model_index.json describes a 'StableDiffusionPipeline', expected a FluxPipeline", folder
    )
    change(folder / "model_index.json", _class_name="FluxFillPipeline")
    change(folder / "transformer/config.json", _class_name="SD3Transformer2DModel")
    refused(
        "transformer/config.json describes a 'SD3Transformer2DModel', expected a Flux",
        folder,
    )


@pytest.mark.parametrize(
    "part", ["transformer", "vae", "text_encoder", "text_encoder_2", "scheduler"]
)
@pytest.mark.parametrize("text", ["", "{", "[1]", "3"])
def test_a_config_that_is_no_json_object_is_refused(folder, part, text):
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(text)
    refused(f"{part}/.*config.json (is not valid JSON|holds a)", folder)


@pytest.mark.parametrize(
    "part, values, message",
    [
        ("scheduler/scheduler_config", {"shift": "3"}, "shift is '3', expected a positive number"),
        ("scheduler/scheduler_config", {"shift": None}, "shift is None"),
        ("scheduler/scheduler_config", {"shift": 0}, "shift is 0"),
        (
            "scheduler/scheduler_config",
            {"use_dynamic_shifting": "no"},
            "use_dynamic_shifting is 'no', expected true or false",
        ),
        (
            "vae/config",
            {"sample_size": [512, 512]},
            "sample_size is .512, 512., expected a whole number",
        ),
        ("vae/config", {"sample_size": -512}, "sample_size is -512"),
        ("transformer/config", {"num_layers": "2"}, "num_layers is '2'"),
        (
            "transformer/config",
            {"num_layers": 3},
            "is not a MMDiT of these sizes: missing double_blocks.2",
        ),
        ("text_encoder/config", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        (
            "text_encoder_2/config",
            {"relative_attention_max_distance": -1},
            "relative_attention_max_distance is -1",
        ),
    ],
    ids=str,
)
def test_a_config_with_a_value_that_cannot_be_is_refused(folder, part, values, message):
    change(folder / f"{part}.json", **values)
    refused(f"{part.split('/')[0]}.*{message}", folder)


@pytest.mark.parametrize(
    "part, file",
    [
        ("transformer", "config.json"),
        ("vae", "config.json"),
        ("text_encoder", "config.json"),
        ("text_encoder", "model.safetensors"),
        ("tokenizer", "vocab.json"),
        ("tokenizer", "merges.txt"),
        ("vae", "diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_missing_file_is_named(folder, part, file):
    (folder / part / file).unlink()
    refused(f"{part}/{file}", folder, FileNotFoundError)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_truncated_part_is_refused(folder, part):
    path, = (folder / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    refused(f"{part}/{path.name} is not a complete safetensors file", folder)


def test_parts_of_other_widths_do_not_belong_together(folder, pristine):
    for part, model, message in (
            ("transformer", transformer(pooled=25), "CLIP's width is 24, expected 25"),
            ("transformer", transformer(joint=40), "T5's width is 32, expected 40"),
            ("text_encoder_2", t5(400, d_model=24), "T5's width is 24, expected 32")):
        shutil.rmtree(folder / part)
        model.save_pretrained(folder / part)
        refused(f"the parts of {folder} do not belong together: {message}", folder)
        shutil.rmtree(folder / part), shutil.copytree(pristine / part, folder / part)


def test_a_transformer_for_other_latents_does_not_belong_to_the_autoencoder(folder, tmp_path):
    state = mmdit_from_diffusers(transformer().state_dict())
    state |= {
        name: state[name][:32] for name in ("final_layer.linear.weight", "final_layer.linear.bias")
    }
    refused(
        "latent channels x 4 is 64, expected 32",
        folder,
        transformer=save(tmp_path / "a.safetensors", state),
    )


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(folder, pristine):
    for encoder, smaller, message in (
        ("text_encoder", clip(100), "CLIP's largest token is [0-9]+, expected at most 99"),
        ("text_encoder_2", t5(50), "T5's largest token is [0-9]+, expected at most 49"),
    ):
        shutil.rmtree(folder / encoder)
        smaller.save_pretrained(folder / encoder)
        refused(message, folder)
        shutil.rmtree(folder / encoder), shutil.copytree(pristine / encoder, folder / encoder)


def test_a_tokenizer_longer_than_the_positions_is_refused(folder):
    change(folder / "tokenizer/tokenizer_config.json", model_max_length=100)
    refused("CLIP's number of tokens is 100, expected at most 77", folder)


@pytest.mark.parametrize("device", ["banana", "cuda:99", "", "cpu:x"])
def test_a_device_that_is_not_here_is_refused(device):
    with pytest.raises(ValueError, match=f"the device {device!r} cannot be used here: ") as caught:
        find_device(device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn, "float16"])
def test_a_type_that_is_none_of_three_is_refused(folder, dtype):
    refused("expected torch.float32, torch.bfloat16 or torch.float16", folder, dtype=dtype)


def test_a_variant_is_a_shipped_model_with_a_lora_merged_for_good(tmp_path):
    """Here a random one that widens the first layer, as for fill: 384 channels a token."""
    from safetensors.torch import save_file

    from miniflux import fill, remove_lora
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 384, generator=draw) * 0.1, torch.randn(192, 4, generator=draw) * 0.1
    save_file({"img_in.lora_A.weight": a, "img_in.lora_B.weight": b}, tmp_path / "lora.safetensors")
    (tmp_path / "variant.json").write_text('{"base": "tiny"}')
    base, variant = load("tiny", device="cpu"), load(tmp_path, device="cpu")
    assert variant.config.name == tmp_path.name
    assert variant.mmdit.config.in_channels == 384
    assert variant.loras is None
    expected = torch.nn.functional.pad(base.mmdit.img_in.weight, (0, 320)) + b @ a
    assert torch.allclose(variant.mmdit.img_in.weight, expected, atol=1e-6)
    (picture,) = fill(
        variant,
        "an owl",
        torch.full((3, 128, 128), 0.5),
        torch.ones(128, 128),
        steps=1,
        progress=False,
    )
    assert picture.size == (128, 128)
    with pytest.raises(ValueError, match="no LoRA to remove"):
        remove_lora(variant)
    (tmp_path / "variant.json").write_text('{"base": "../tiny"}')
    with pytest.raises(
        ValueError, match="names the base '../tiny': expected a shipped model such as tiny"
    ):
        load(tmp_path, device="cpu")
