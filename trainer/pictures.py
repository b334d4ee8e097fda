"""The sample pictures of a run: which prompts, which seeds, where they go."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from PIL import Image

from trainer import sampling
from trainer.events import Phase, Sample, Warned
from trainer.prepare import Session
from trainer.prompts import Prompt
from trainer.randomness import seed_for
from trainer.schema import Config
from trainer.trackers import Shown

log = logging.getLogger(__name__)
BLACK = "Where the first one is: Mixed precision (mixed_precision) or VAE. Where it came later: a lower learning rate."


def draw_samples(s: Session, step: int) -> None:
    """Draw every prompt with the model as it is now. A prompt that fails is reported, not fatal.

    Raises Stopped when a stop is asked for meanwhile.

    A prompt without a seed has one that follows from the run's seed and its place, so that its
    pictures at different steps can be compared.
    """
    s.model.vae.to(s.accelerator.device)
    shown = []
    for index, prompt in enumerate(s.prompts):
        s.emit(Phase("drawing samples", index, len(s.prompts)))
        if image := _draw(s, step, index, prompt):
            shown.append(Shown(index, prompt.prompt, image))
    s.trackers.show(shown, step)
    _done(s, step)


def draw_comparison(s: Session, step: int) -> None:
    """At the end: the first prompt with the LoRA and without it, from the same seed, as far as not drawn before.

    A training from nothing began with the picture without it; one that went on from a LoRA or a state
    did not. At most two pictures.
    """
    s.model.vae.to(s.accelerator.device)
    prompt = s.prompts[0]
    missing = [0.0] if s.first_step > 1 or s.config.network.weights else []
    missing += [] if _path(s, step, 0, 1.0).exists() else [1.0]
    for done, strength in enumerate(missing):
        s.emit(Phase("drawing with and without the LoRA", done, len(missing)))
        with s.network.strength(strength):
            _draw(s, step, 0, prompt, strength)
    if missing:
        _done(s, step)


def _draw(s: Session, step: int, index: int, prompt: Prompt, strength: float = 1.0) -> Image.Image | None:
    """Draw, save and tell of one picture; None where it failed. `strength`: the network's, as it is set already."""
    seed, size = seed_and_size(s.config, s.seed, index, prompt)
    try:
        # Compiled blocks would be compiled once more, for answers without gradients.
        with s.network.without_dropout(), torch.compiler.set_stance("force_eager"):
            image = sampling.draw(s.model, prompt, s.config.samples.sampler, size, seed, s.check, s.prompt_texts)
    except (ValueError, RuntimeError) as error:
        log.exception("sample %d failed", index + 1)
        s.emit(Warned(f"Sample prompt {index + 1} could not be drawn: {error}", "Training goes on."))
        return None
    if is_black(image):
        s.emit(Warned(f"The picture of sample prompt {index + 1} at step {step} is black.", BLACK))
    path = _path(s, step, index, strength)
    sampling.save_png(image, path, parameters(prompt, s.config.samples.sampler, size, seed))
    s.emit(Sample(path.relative_to(s.run.folder).as_posix(), prompt.prompt, index, seed, step, strength))
    return image


def seed_and_size(config: Config, run_seed: int, index: int, prompt: Prompt) -> tuple[int, tuple[int, int]]:
    """The seed and (width, height) of the picture of the prompt that stands at `index`, from 0."""
    seed = prompt.seed if prompt.seed is not None else seed_for(run_seed, "sample", index) % 2**32
    return seed, (prompt.width or config.data.resolution[0], prompt.height or config.data.resolution[1])


def is_black(image: Image.Image) -> bool:
    """Whether no channel of any pixel is above 2 of 255."""
    return all(brightest <= 2 for _, brightest in image.getextrema())


def _path(s: Session, step: int, index: int, strength: float) -> Path:
    return s.run.samples / f"{step:08d}_{index:02d}{'' if strength else '_without'}.png"


def _done(s: Session, step: int) -> None:
    if s.config.data.cache_latents and s.accelerator.device.type == "cuda":
        s.model.vae.to("cpu")
        torch.cuda.empty_cache()
    s.emit(Phase("training", step, s.length.total_steps))


def parameters(prompt: Prompt, sampler: str, size: tuple[int, int], seed: int) -> str:
    negative = f"\nNegative prompt: {prompt.negative}" if prompt.negative else ""
    settings = f"Steps: {prompt.steps}, Sampler: {sampler}, CFG scale: {prompt.cfg_scale:g}, Seed: {seed}"
    return f"{prompt.prompt}{negative}\n{settings}, Size: {size[0]}x{size[1]}"
