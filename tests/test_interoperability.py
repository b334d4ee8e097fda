"""A trained file in other programs' hands."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import load_file

from trainer import models, sampling
from trainer.models import clip_tokens


def test_diffusers_loads_every_tensor_and_draws_our_picture_with_it(settings, train, tmp_path, tiny_model):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    prompt = "a cat --n bad --d 3 --s 4 --l 5 --w 64 --h 64"
    train(settings | {"sample_every_n_epochs": 1, "sample_prompts": prompt, "sample_sampler": "ddim", "epoch": 4})
    path = tmp_path / "out" / "photo.safetensors"
    model = models.load(str(tiny_model), "", torch.float32, torch.device("cpu"), 1, 75)
    scheduler = DDIMScheduler(**model.schedule.config, **sampling.SAMPLERS["ddim"].settings)
    pipeline = StableDiffusionPipeline(
        model.vae,
        model.text_encoders["te"],
        clip_tokens.tokenizer(),
        model.unet,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        image = pipeline(
            "a cat",
            negative_prompt="bad",
            width=64,
            height=64,
            guidance_scale=5.0,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(3),
        ).images[0]
        return np.asarray(image, dtype=int)

    without = draw()
    pipeline.load_lora_weights(str(path))
    loaded = sum(p.numel() for n, p in pipeline.unet.named_parameters() if "lora" in n)
    loaded += sum(p.numel() for n, p in pipeline.text_encoder.named_parameters() if "lora" in n)
    assert loaded == sum(t.numel() for k, t in load_file(path).items() if not k.endswith("alpha"))
    with_lora = draw()
    assert np.abs(with_lora - without).max() > 5

    from PIL import Image

    last = sorted((tmp_path / "run1" / "samples").iterdir())[-1]
    ours = np.asarray(Image.open(last), dtype=int)
    assert np.abs(ours - with_lora).max() <= 2
