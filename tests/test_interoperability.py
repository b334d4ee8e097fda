"""A trained file in other programs' hands."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from trainer import models, sampling
from trainer.models import clip_tokens

FAMILIES = {
    "sd1": {},
    "sd2": {"v2": True, "v_parameterization": True},
    "sdxl": {"sdxl": True, "max_resolution": "96,96"},
}


def pipeline_of(path: Path) -> Any:
    """Diffusers' own pipeline on a base model's file."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    model = models.load(str(path), "", torch.float32, torch.device("cpu"), 1, 75)
    scheduler = DDIMScheduler(**model.schedule.config, **sampling.SAMPLERS["ddim"].settings)
    first, second = clip_tokens.tokenizer(), copy.deepcopy(clip_tokens.tokenizer())
    second.pad_token = "!"
    if "te2" in model.text_encoders:
        encoders = {"text_encoder": model.text_encoders["te1"], "text_encoder_2": model.text_encoders["te2"]}
        made = StableDiffusionXLPipeline(
            model.vae, **encoders, tokenizer=first, tokenizer_2=second, unet=model.unet, scheduler=scheduler,
            add_watermarker=False,
        )  # fmt: skip
    else:
        tokenizer = second if model.family.name == "sd2" else first
        parts = (model.vae, model.text_encoders["te"], tokenizer, model.unet, scheduler)
        made = StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_every_tensor_and_draws_our_picture_with_it(
    family, settings, train, tmp_path, tiny_model, tiny_sd2, tiny_sdxl
):
    base = {"sd1": tiny_model, "sd2": tiny_sd2, "sdxl": tiny_sdxl}[family]
    settings |= FAMILIES[family] | {"pretrained_model_name_or_path": str(base)}
    prompt = "a cat --n bad --d 3 --s 4 --l 5 --w 96 --h 96"
    code, _, run = train(
        settings | {"sample_every_n_epochs": 1, "sample_prompts": prompt, "sample_sampler": "ddim", "epoch": 4}
    )
    assert code == 0
    path = tmp_path / "out" / "photo.safetensors"
    pipeline = pipeline_of(base)

    def draw() -> np.ndarray:
        image = pipeline(
            "a cat",
            negative_prompt="bad",
            width=96,
            height=96,
            guidance_scale=5.0,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(3),
        ).images[0]
        return np.asarray(image, dtype=int)

    without = draw()
    pipeline.load_lora_weights(str(path))
    parts = (getattr(pipeline, name, None) for name in ("unet", "text_encoder", "text_encoder_2"))
    loaded = sum(p.numel() for part in parts if part for n, p in part.named_parameters() if "lora" in n)
    assert loaded == sum(t.numel() for k, t in load_file(path).items() if not k.endswith("alpha"))
    with_lora = draw()
    assert np.abs(with_lora - without).max() > 5

    last = sorted((run / "samples").iterdir())[-1]
    ours = np.asarray(Image.open(last), dtype=int)
    assert np.abs(ours - with_lora).max() <= 2
