"""SDXL and SD 2.x beside diffusers' and transformers' own parts, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from tests import reference, tiny
from tests.models.test_sd import CPU, full_size, load, parts_of
from trainer import models
from trainer.data import cache
from trainer.errors import TrainingError
from trainer.models import clip_tokens

TEXTS = ["a photo of a cat", "", "a, b, c (d:1.2) 日本語"]


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def both(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A family's tiny model as a file and as a diffusers folder."""
    root = tmp_path_factory.mktemp("models")
    file = getattr(tiny, f"write_{request.param}")(root / "model.safetensors")
    parts = getattr(tiny, f"{request.param}_modules")()
    folder = root / "folder"
    for part, module in parts.items():
        module.save_pretrained(folder / part)
    (folder / "scheduler").mkdir()
    scheduler = tiny.CONFIGS["scheduler"] | {"prediction_type": "v_prediction" if request.param == "sd2" else "epsilon"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return file, folder


@pytest.mark.proves("pretrained_model_name_or_path", "v2", "sdxl")
def test_a_single_file_and_a_folder_are_the_same_model(both):
    one, other = (load(path) for path in both)
    assert one.family is other.family
    assert one.schedule.prediction == other.schedule.prediction
    for mine, theirs in zip(parts_of(one), parts_of(other), strict=True):
        states = dict(mine.named_parameters()), dict(theirs.named_parameters())
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_weights_are_loaded_in_the_compute_dtype_and_frozen(both):
    for part in parts_of(load(both[0], torch.bfloat16)):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in part.parameters())


def ids(texts: list[str], padding: str) -> torch.Tensor:
    tokenizer = clip_tokens.tokenizer()
    rows = [tokenizer(clip_tokens.clean(text))["input_ids"] for text in texts]
    fill = tokenizer.convert_tokens_to_ids(padding)
    return torch.tensor([row + [fill] * (77 - len(row)) for row in rows])


@pytest.mark.proves("v2")
def test_sd2_attends_to_open_clip_through_the_final_norm(tiny_sd2):
    model = load(tiny_sd2)
    expected = tiny.sd2_modules()["text_encoder"].eval()(ids(TEXTS, "!")).last_hidden_state
    torch.testing.assert_close(model.text_states(model.tokens(TEXTS)).states, expected)
    assert model.text_states(model.tokens(TEXTS)).pooled is None


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    parts = tiny.sdxl_modules()
    second = clip_tokens.tokenizer.__wrapped__()
    second.pad_token = "!"
    scheduler = DDIMScheduler(**tiny.CONFIGS["scheduler"])
    encoders = parts["text_encoder"].eval(), parts["text_encoder_2"].eval()
    return StableDiffusionXLPipeline(
        parts["vae"], *encoders, clip_tokens.tokenizer(), second, parts["unet"].eval(), scheduler
    )


@pytest.mark.proves("sdxl")
@torch.no_grad()
def test_sdxl_answers_as_diffusers_own_pipeline(tiny_sdxl, pipeline):
    model = load(tiny_sdxl, clip_skip=2)  # which SDXL has no use for
    states, _, pooled, _ = pipeline.encode_prompt(TEXTS[:2], do_classifier_free_guidance=False, device=CPU)
    text = model.text_states(model.tokens(TEXTS[:2]))
    torch.testing.assert_close(text.states, states)
    torch.testing.assert_close(text.pooled, pooled)

    original, crop, target = (1023, 683), (0, 86), (1024, 512)
    width = pipeline.text_encoder_2.config.projection_dim
    time_ids = pipeline._get_add_time_ids(original, crop, target, torch.float32, width).repeat(2, 1)
    assert time_ids[0].tolist() == [*original, *crop, *target]
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    added = {"text_embeds": pooled, "time_ids": time_ids}
    expected = pipeline.unet(x, t, states, added_cond_kwargs=added).sample
    torch.testing.assert_close(model.predict(x, t, text, time_ids), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sizes_are_not_rounded_to_the_compute_dtype(tiny_sdxl):
    """bf16 has no 1023: it would be 1024."""
    model = load(tiny_sdxl, torch.bfloat16)
    text = model.text_states(model.tokens(["a cat"]))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    answers = [model.predict(x, t, text, torch.tensor([[side, 512.0, 0, 0, 512, 512]])) for side in (1023.0, 1024.0)]
    assert not torch.equal(*answers)


@pytest.mark.proves("max_token_length")
@torch.no_grad()
def test_long_texts_pool_their_first_chunk(tiny_sdxl):
    model = load(tiny_sdxl, tokens=225)
    long = ", ".join(["cat"] * 60)
    text = model.text_states(model.tokens([long]))
    assert text.states.shape == (1, 227, 80)
    short = load(tiny_sdxl, tokens=75)
    torch.testing.assert_close(text.pooled, short.text_states(short.tokens([long])).pooled)


@pytest.mark.proves("v_parameterization")
def test_the_settings_say_what_is_predicted_where_they_say_it(tiny_sdxl, tmp_path):
    def prediction(path, said=""):
        return models.load(str(path), "", torch.float32, CPU, 1, 75, prediction=said).schedule.prediction

    assert prediction(tiny_sdxl) == "epsilon"
    assert prediction(tiny_sdxl, "v_prediction") == "v_prediction"
    silent = tiny.write_sdxl(tmp_path / "silent.safetensors", prediction="")
    assert prediction(silent) == "epsilon"
    assert prediction(tiny.write_sdxl(tmp_path / "marked.safetensors", prediction="", marks=("v_pred",))) == (
        "v_prediction"
    )


@pytest.mark.proves("sdxl_no_half_vae")
def test_the_vae_may_have_a_dtype_of_its_own_and_latents_that_are_no_numbers_are_told(tiny_sdxl):
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    half = models.load(str(tiny_sdxl), "", torch.float16, CPU, 1, 75)
    half.vae.encoder.conv_in.weight.mul_(1e6)
    with pytest.raises(TrainingError, match=r'"cat.png": it cannot compute in fp16.*\(sdxl_no_half_vae\)'):
        cache.encode(half, pixels, ["cat.png"])
    full = models.load(str(tiny_sdxl), "", torch.float16, CPU, 1, 75, vae_dtype=torch.float32)
    assert (full.vae.dtype, full.unet.dtype) == (torch.float32, torch.float16)
    full.vae.encoder.conv_in.weight.mul_(1e6)
    assert full.encode(pixels).isfinite().all()
    torch.testing.assert_close(
        load(tiny_sdxl).encode(pixels, torch.Generator().manual_seed(0)),
        tiny.sdxl_modules()["vae"].encode(pixels).latent_dist.sample(torch.Generator().manual_seed(0)) * 0.13025,
        rtol=1e-4,
        atol=1e-5,
    )


def expanded(rows: dict[str, list]) -> dict[str, tuple[list[int], list[int]]]:
    """Each module with the shapes of its down and up weights, from rows in which * stands for a number."""
    return {name.replace("*", str(i)): (down, up) for name, (count, down, up) in rows.items() for i in range(count)}


@pytest.mark.parametrize(("name", "counts"), [("sdxl", (72 + 192, 722)), ("sd2", (23 * 6, 192))])
def test_the_layers_of_a_full_size_model_are_those_of_sd_scripts(name, counts):
    expected = reference.read(f"{name}_lora_keys")
    targets = full_size(name).targets()
    attention = {key: target for key, target in targets.items() if target.place == "attention"}
    rows = expanded(expected["lora"])
    assert attention.keys() == rows.keys()
    parts = [target.part for target in attention.values()]
    assert (parts.count("text_encoder"), parts.count("unet")) == counts
    for key, (down, up) in rows.items():
        shape = attention[key].layer.weight.shape
        assert (shape[1], shape[0]) == (down[1], up[0])
    if "locon" in expected:
        resnets = {key for key, target in targets.items() if target.place == "resnet"}
        assert resnets == expanded(expected["locon"]).keys()
