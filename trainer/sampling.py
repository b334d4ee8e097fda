"""Sample pictures: diffusers' samplers over the model as it is being trained."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from trainer.data.texts import of_prompt
from trainer.models import Schedule, TextStates
from trainer.prompts import Prompt
from trainer.run import unfinished
from trainer.transfer import send


@dataclass(frozen=True)
class Row:
    """A diffusers scheduler class and how it is set up."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


_ROWS = {
    "ddim": Row("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "pndm": Row("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "lms": Row("LMSDiscreteScheduler"),
    "euler": Row("EulerDiscreteScheduler"),
    "euler_a": Row("EulerAncestralDiscreteScheduler"),
    "heun": Row("HeunDiscreteScheduler"),
    "dpm_2": Row("KDPM2DiscreteScheduler"),
    "dpm_2_a": Row("KDPM2AncestralDiscreteScheduler"),
    "dpmsolver": Row("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": Row("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": Row("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
}
SAMPLERS = _ROWS | {f"k_{name}": _ROWS[name] for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}


def make_sampler(name: str, schedule: Schedule) -> Any:
    """A fresh diffusers scheduler for a web UI's sampler name, on the base model's noise schedule."""
    row = SAMPLERS[name]
    kind = getattr(importlib.import_module("diffusers"), row.name)
    known = inspect.signature(kind).parameters  # timestep_spacing is not known to all
    return kind(**{k: v for k, v in schedule.config.items() if k in known}, **row.settings)


@torch.no_grad()
def draw(
    model: Any,
    prompt: Prompt,
    sampler: str,
    size: tuple[int, int],
    seed: int,
    check: Callable[[], None] = lambda: None,
    texts: Mapping[Prompt, TextStates] | None = None,
) -> Image.Image:
    """One picture of `prompt`, (width, height) pixels, with classifier-free guidance.

    Randomness comes from `seed` alone and is drawn on the CPU, so that devices agree. `check` is
    called in every step and may raise to end the drawing. `texts` has the prompts' states where
    the text encoders are not there any more.
    """
    generator = torch.Generator().manual_seed(seed)
    scheduler = make_sampler(sampler, model.schedule)
    scheduler.set_timesteps(prompt.steps, device=model.device)
    width, height = size
    cell = model.pixels_per_latent
    latents = torch.randn((1, 4, height // cell, width // cell), generator=generator).to(model.device)
    latents = latents * scheduler.init_noise_sigma
    asked = prompt.texts
    text = texts[prompt].each(lambda part: send(part, model.device)) if texts else of_prompt(model, prompt)
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(asked), device=model.device)
    extra = {"generator": generator} if _takes_generator(scheduler) else {}
    for t in scheduler.timesteps:
        check()
        noisy = scheduler.scale_model_input(latents, t).expand(len(asked), -1, -1, -1)
        answer = model.predict(noisy, t, text, sizes)
        if len(asked) == 2:
            without, with_prompt = answer.chunk(2)
            answer = without + prompt.cfg_scale * (with_prompt - without)
        latents = scheduler.step(answer, t, latents, return_dict=False, **extra)[0]
    return to_image(model.decode(latents)[0])


def _takes_generator(scheduler: Any) -> bool:
    return "generator" in scheduler.step.__code__.co_varnames


def to_image(pixels: torch.Tensor) -> Image.Image:
    """[3,H,W] in −1…1 as a picture. Raises ValueError where a value is not a number."""
    if not torch.isfinite(pixels).all():
        raise ValueError(
            "the picture holds values that are not numbers. Where Mixed precision (mixed_precision) is fp16, switch on "
            "No half VAE (sdxl_no_half_vae)."
        )
    array = pixels.add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array))


def save_png(image: Image.Image, path: Path, parameters: str) -> None:
    """Write a picture whole, with its prompt and settings inside, where the web UIs look for them."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", parameters)
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
