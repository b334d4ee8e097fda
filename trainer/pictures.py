"""The sample pictures of a run: which prompts, which seeds, where they go."""

from __future__ import annotations

import logging

import torch

from trainer import sampling
from trainer.events import Phase, Sample, Warned
from trainer.prepare import Session
from trainer.prompts import Prompt
from trainer.randomness import seed_for
from trainer.trackers import Shown

log = logging.getLogger(__name__)


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
        seed = prompt.seed if prompt.seed is not None else seed_for(s.seed, "sample", index) % 2**32
        size = prompt.width or s.config.data.resolution[0], prompt.height or s.config.data.resolution[1]
        try:
            with s.network.without_dropout():
                image = sampling.draw(s.model, prompt, s.config.samples.sampler, size, seed, s.check)
        except (ValueError, RuntimeError) as error:
            log.exception("sample %d failed", index + 1)
            s.emit(Warned(f"Sample prompt {index + 1} could not be drawn: {error}", "Training goes on."))
            continue
        path = s.run.samples / f"{step:08d}_{index:02d}.png"
        sampling.save_png(image, path, _parameters(prompt, s.config.samples.sampler, size, seed))
        shown.append(Shown(index, prompt.prompt, image))
        s.emit(Sample(path.relative_to(s.run.folder).as_posix(), prompt.prompt, index, seed, step))
    s.trackers.show(shown, step)
    if s.config.data.cache_latents and s.accelerator.device.type == "cuda":
        s.model.vae.to("cpu")
        torch.cuda.empty_cache()
    s.emit(Phase("training", step, s.length.total_steps))


def _parameters(prompt: Prompt, sampler: str, size: tuple[int, int], seed: int) -> str:
    negative = f"\nNegative prompt: {prompt.negative}" if prompt.negative else ""
    settings = f"Steps: {prompt.steps}, Sampler: {sampler}, CFG scale: {prompt.cfg_scale:g}, Seed: {seed}"
    return f"{prompt.prompt}{negative}\n{settings}, Size: {size[0]}x{size[1]}"
