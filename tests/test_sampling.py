from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from trainer import models, sampling
from trainer.data.texts import of_prompts
from trainer.models import clip_tokens
from trainer.prompts import Prompt


@pytest.fixture(scope="module")
def model(tiny_model):
    return models.load(str(tiny_model), "", torch.float32, torch.device("cpu"), 1, 75)


@pytest.mark.proves("sample_sampler")
@pytest.mark.parametrize("name", sampling.SAMPLERS)
def test_every_sampler_draws_a_picture_of_the_asked_size(model, name):
    image = sampling.draw(model, Prompt("a cat", steps=4), name, (64, 96), seed=1)
    assert image.size == (64, 96)
    assert np.asarray(image).std() > 0


def test_the_seed_decides_the_picture_and_training_randomness_does_not(model):
    def draw(seed: int, global_seed: int) -> bytes:
        torch.manual_seed(global_seed)
        return sampling.draw(model, Prompt("a cat", steps=3), "euler_a", (64, 64), seed).tobytes()

    assert draw(1, 0) == draw(1, 99)
    assert draw(1, 0) != draw(2, 0)


def test_the_picture_is_that_of_diffusers_own_pipeline(model):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    row = sampling.SAMPLERS["ddim"]
    pipeline = StableDiffusionPipeline(
        model.vae,
        model.text_encoders["te"],
        clip_tokens.tokenizer(),
        model.unet,
        DDIMScheduler(**model.schedule.config, **row.settings),
        None,
        None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a cat",
        negative_prompt="blurry",
        width=64,
        height=96,
        guidance_scale=5.0,
        num_inference_steps=6,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    ours = sampling.draw(model, Prompt("a cat", "blurry", cfg_scale=5.0, steps=6), "ddim", (64, 96), seed=3)
    difference = np.abs(np.asarray(ours, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= 1


def test_the_end_of_a_long_prompt_shows_and_kept_states_give_the_same_picture(model):
    long = ", ".join(f"thing {n}" for n in range(30))
    drawn = set()
    for prompt in (Prompt(f"{long}, red", steps=2), Prompt(f"{long}, blue", steps=2), Prompt("red", long, steps=2)):
        picture = sampling.draw(model, prompt, "ddim", (64, 64), seed=1).tobytes()
        kept = of_prompts(model, [Prompt("other"), prompt])
        assert sampling.draw(model, prompt, "ddim", (64, 64), seed=1, texts=kept).tobytes() == picture
        drawn.add(picture)
    assert len(drawn) == 3


def test_a_picture_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="not numbers"):
        sampling.to_image(torch.full((3, 8, 8), float("nan")))


def test_pictures_carry_their_prompt(tmp_path):
    path = tmp_path / "a" / "x.png"
    sampling.save_png(Image.new("RGB", (8, 8)), path, "a cät\nSteps: 4")
    assert Image.open(path).info["parameters"] == "a cät\nSteps: 4"
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]
