"""The training loop, and what happens in a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Literal

import torch

from trainer import objective, optim, recovery, saving, state
from trainer.data import cache, texts
from trainer.data.feed import Batch
from trainer.due import draws_samples, files_due, forecast_files, forecast_samples, samples_due, state_due
from trainer.errors import Stopped
from trainer.events import Ended, Phase
from trainer.forecast import Forecast
from trainer.models import TextStates
from trainer.pictures import draw_comparison, draw_samples
from trainer.prepare import Session
from trainer.randomness import generator_at, set_torch_to
from trainer.reporting import Reporter
from trainer.transfer import send


def train(s: Session, requests: Callable[[], set[str]]) -> Ended:
    """Train to the end, or until a stop is asked for. Every finished step is in the events.

    `requests` returns what was asked for since its last call: stop, save, sample.
    """
    began = time.monotonic()
    s.network.attach()
    forecast = Forecast({"files": forecast_files(s), "pictures": forecast_samples(s)})
    if draws_samples(s):
        with forecast.pause("pictures", 0), optim.averaged(s.optimizer):
            draw_samples(s, s.first_step - 1)
    s.emit(Phase("training", s.first_step - 1, s.length.total_steps))
    report = Reporter(s, forecast)
    step, path = s.first_step - 1, ""
    batches = batches_behind(s, step)
    asked: set[str] = set()
    while step < s.length.total_steps and "stop" not in asked:
        try:
            loss, rates = take_step(s, step + 1, batches)
            step += 1
            report.add(step, loss, rates)
            asked = s.team.asked(requests())
            files, pictures = files_due(s, step, asked), samples_due(s, step, asked)
            if files or pictures:
                report.flush()
        except Exception as error:
            step, asked = recovery.go_on(s, step, error, saving.save_stopgap), set()
            batches = batches_behind(s, step)
            report.forget()
            continue
        if files or pictures:
            with optim.averaged(s.optimizer):
                for due in files:
                    with forecast.pause("files", step):
                        path = saving.save(s, step, due)
            # Behind the files, so that a training that goes on from a state has made all that was due until then.
            if state_due(s, step, asked):
                for due in files:
                    with forecast.pause("files", step):
                        saving.save_state(s, step, due)
            elif files and step < s.length.total_steps and "stop" in asked:
                saving.save_stopgap(s, step)
            if pictures:
                with (
                    optim.averaged(s.optimizer),
                    forecast.pause("pictures", step),
                    suppress(Stopped),
                ):  # asked for while drawing; the next step finds it again
                    draw_samples(s, step)
            report.resume()
    report.flush()
    if step == s.length.total_steps and draws_samples(s):
        with optim.averaged(s.optimizer), suppress(Stopped):
            draw_comparison(s, step)
    s.network.detach()
    s.trackers.close()
    s.accelerator.end_training()
    status: Literal["done", "stopped"] = "done" if step == s.length.total_steps else "stopped"
    if status == "done" and s.team.leads:
        state.supersede(s.resumed)
    return Ended(status, step, path, round(time.monotonic() - began, 1))


def batches_behind(s: Session, step: int) -> Iterator[Batch]:
    """All batches that are left after a step."""
    return s.feed.batches(range(min(step * s.length.accumulation, s.length.total_batches), s.length.total_batches))


def take_step(s: Session, step: int, batches: Iterator[Batch]) -> tuple[torch.Tensor, dict[str, float]]:
    """One optimizer step over `accumulation` batches. Returns its mean loss and the rates it used.

    The loss is NaN where it or the gradient is not finite; such a step is left out where the settings say so. It is
    infinite where a weight is not finite behind the step, which nothing can leave out.
    """
    if stops_text_encoder(s, step):
        for parameter in s.network.parameters_of("text_encoder"):
            parameter.requires_grad_(False)
    s.network.draw(generator_at(s.seed, "unit", step).random())
    numbers = s.length.batches_of(step)
    total = torch.zeros((), device=s.accelerator.device)
    for number in numbers:
        batch = next(batches)
        set_torch_to(s.seed, "noise", number, *(["return", len(s.returns)] if s.returns else []))
        with s.network.cast(s.model.dtype):
            for part in [batch_loss(s, batch)] if s.parts == 1 else losses_of_parts(s, batch):
                loss = part / len(numbers)
                if loss.requires_grad:  # not where dropout left every module out
                    s.accelerator.backward(loss)
                total += loss.detach()
    weights = s.network.weights
    total = s.team.sum(weights, total)
    if all(weight.grad is None for weight in weights):
        for weight in weights:
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    s.whole = False
    if s.config.optim.max_grad_norm:
        norm = s.accelerator.clip_grad_norm_(weights, s.config.optim.max_grad_norm)
    else:
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    scaled = s.accelerator.scaler is not None  # leaves out the steps whose gradients overflowed by itself
    if not scaled:
        total = torch.where(torch.isfinite(norm) & torch.isfinite(total), total, math.nan)
    rates = optim.rates(s.optimizer, s.scheduler)
    if scaled or not s.config.optim.most_skipped or torch.isfinite(total):
        s.optimizer.step()
    overflowed = scaled and s.optimizer.step_was_skipped  # type: ignore[attr-defined]  accelerate's wrapper
    if overflowed and s.accelerator.scaler.get_scale() < 1:
        total = torch.full_like(total, math.nan)  # there is nothing left to scale down
    if not overflowed:
        s.scheduler.step()
    s.optimizer.zero_grad(set_to_none=True)
    if s.config.network.max_norm:
        s.network.limit_norms(s.config.network.max_norm)
    s.whole = True
    largest = torch.nn.utils.get_total_norm([weight.detach() for weight in weights], math.inf)
    return torch.where(torch.isfinite(largest) | torch.isnan(total), total, math.inf), rates


def batch_loss(s: Session, batch: Batch) -> torch.Tensor:
    """The mean loss of a batch under torch's present random state; of a share, its part of that mean.

    The noise of a share is that of the whole batch; what dropout leaves out is drawn for each process.
    """
    latents = latents_of(s, batch)
    if batch.is_whole:
        return loss_per_image(s, batch, noised(s, latents), text_of(s, batch)).mean()
    whole = latents.new_zeros(batch.images, *latents.shape[1:])
    places = send(torch.tensor(batch.places), latents.device)
    whole[places] = latents
    drawn = tuple(tensor[places] for tensor in noised(s, whole))
    set_torch_to(torch.initial_seed(), "share", s.team.place.rank)
    return loss_per_image(s, batch, drawn, text_of(s, batch)).sum() / batch.images


def losses_of_parts(s: Session, batch: Batch) -> Iterator[torch.Tensor]:
    """The mean loss of a batch in `s.parts` terms, whose graphs need not be in memory together.

    The noise is the whole batch's, so the terms' gradients add up to its own but for rounding; what dropout leaves
    out is drawn for each part.
    """
    latents = latents_of(s, batch)
    every = noised(s, latents)
    images = len(batch.captions)
    for some in torch.arange(images).tensor_split(min(s.parts, images)):
        part = batch.only(some)
        here = send(some, latents.device)
        yield loss_per_image(s, part, tuple(tensor[here] for tensor in every), text_of(s, part)).sum() / images


def latents_of(s: Session, batch: Batch) -> torch.Tensor:
    """A batch's latents [B,4,h,w] on the device: cached, or encoded now."""
    if batch.latents is not None:
        return send(batch.latents, s.accelerator.device)
    assert batch.pixels is not None
    among = None if batch.is_whole else (batch.places, batch.images)
    # The same draws of noise, however the VAE lays its answer out.
    return cache.encode(s.model, batch.pixels, batch.names, among=among).contiguous()


def text_of(s: Session, batch: Batch) -> TextStates:
    """What the U-Net is told of a batch's captions: cached, or from the text encoders as they are now."""
    if s.captions:
        return s.captions.of(batch.captions, s.accelerator.device)
    trained = any(p.requires_grad for p in s.network.parameters_of("text_encoder"))
    with nullcontext() if trained else torch.no_grad():
        return texts.answer(s.model, batch.all_captions, s.config.captions, batch.places)


def noised(s: Session, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Latents [B,4,h,w] with drawn noise: themselves, noisy, the noise, and the timesteps [B]."""
    settings, schedule = s.config.objective, s.model.schedule
    noise = objective.noise_like(latents, settings)
    timesteps = objective.draw_timesteps(len(latents), schedule, settings)
    noisy = schedule.add_noise(latents, objective.perturbed(noise, settings), timesteps)
    return latents, noisy, noise, timesteps


def loss_per_image(s: Session, batch: Batch, drawn: tuple[torch.Tensor, ...], text: TextStates) -> torch.Tensor:
    """Each image's loss [B], from `noised` latents."""
    device, schedule = s.accelerator.device, s.model.schedule
    latents, noisy, noise, timesteps = drawn
    prediction = s.model.predict(noisy, timesteps, text, send(batch.sizes, device))
    wanted = objective.target(latents, noise, timesteps, schedule)
    weights = send(batch.weights, device)
    masks = None if batch.masks is None else send(batch.masks, device)
    return objective.loss_per_image(prediction, wanted, timesteps, weights, schedule, s.config.objective, masks)


def stops_text_encoder(s: Session, step: int) -> bool:
    """Whether the text encoder's share of the steps is over before this one."""
    percent = s.config.optim.stop_text_encoder_percent
    return bool(percent) and step > s.length.total_steps * percent / 100
