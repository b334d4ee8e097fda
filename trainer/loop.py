"""The training loop: what happens in a step, and what is due after it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Literal

import torch

from trainer import checkpoint, objective, optim, recovery, state
from trainer.data import cache, texts
from trainer.data.feed import Batch
from trainer.errors import Stopped, TrainingError
from trainer.events import Ended, Phase, Saved, Step, Warned
from trainer.forecast import Forecast
from trainer.lora.verifying import Expected, verify
from trainer.models import TextStates
from trainer.paths import shown
from trainer.pictures import draw_comparison, draw_samples
from trainer.prepare import Session, memory_bytes
from trainer.randomness import generator_at, set_torch_to
from trainer.retention import Due

log = logging.getLogger(__name__)
EVENTS_EVERY_S = 0.5


def train(s: Session, requests: Callable[[], set[str]]) -> Ended:
    """Train to the end, or until a stop is asked for. Every finished step is in the events.

    `requests` returns what was asked for since its last call: stop, save, sample.
    """
    began = time.monotonic()
    s.network.attach()
    steps = range(s.first_step, s.length.total_steps + 1)
    forecast = Forecast(
        {
            "files": [step for step in steps if files_due(s, step, set())],
            "pictures": [step for step in steps if samples_due(s, step, set())],
        }
    )
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
            step, asked = recovery.go_on(s, step, error, save_stopgap), set()
            batches = batches_behind(s, step)
            report.forget()
            continue
        if files or pictures:
            with optim.averaged(s.optimizer):
                for due in files:
                    with forecast.pause("files", step):
                        path = save(s, step, due)
            # Behind the files, so that a training that goes on from a state has made all that was due until then.
            if state_due(s, step, asked):
                for due in files:
                    with forecast.pause("files", step):
                        save_state(s, step, due)
            elif files and step < s.length.total_steps and "stop" in asked:
                save_stopgap(s, step)
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


def files_due(s: Session, step: int, asked: set[str]) -> list[Due]:
    """The files to write after a step."""
    saving = s.config.saving
    if not s.team.leads:
        return []
    if step == s.length.total_steps:
        return [Due(checkpoint.file_name(saving.name))]
    files = []
    epoch = epoch_ended(s, step)
    if epoch and divides(saving.every_n_epochs, epoch):
        files.append(Due(checkpoint.file_name(saving.name, epoch=epoch), "epoch", epoch))
    if divides(saving.every_n_steps, step):
        files.append(Due(checkpoint.file_name(saving.name, step=step), "step", step))
    elif asked & {"save", "stop"}:
        files.append(Due(checkpoint.file_name(saving.name, step=step)))
    return files


def state_due(s: Session, step: int, asked: set[str]) -> bool:
    """Whether a state is written beside a step's files."""
    ends = step == s.length.total_steps or "stop" in asked
    return s.config.saving.state or (s.config.saving.state_at_end and ends)


def draws_samples(s: Session) -> bool:
    """Whether pictures are drawn in this training without being asked for."""
    return s.team.leads and bool(s.prompts) and bool(s.config.samples.every_n_steps or s.config.samples.every_n_epochs)


def samples_due(s: Session, step: int, asked: set[str]) -> bool:
    """Whether pictures are to be drawn after a step; a stop does not wait for them."""
    settings, epoch = s.config.samples, epoch_ended(s, step)
    due = divides(settings.every_n_steps, step) or (epoch and divides(settings.every_n_epochs, epoch))
    return s.team.leads and bool(s.prompts) and "stop" not in asked and bool(due or "sample" in asked)


def epoch_ended(s: Session, step: int) -> int:
    """The epoch that a step completed, counted from 1; 0 if none."""
    done = s.length.epochs_done(step)
    return done if done > s.length.epochs_done(step - 1) else 0


def divides(every: int, number: int) -> bool:
    """Whether something that is due every so often (0: never) is due now."""
    return every > 0 and number % every == 0


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
        for part in [batch_loss(s, batch)] if s.parts == 1 else losses_of_parts(s, batch):
            loss = part / len(numbers)
            s.accelerator.backward(loss)
            total += loss.detach()
    total = s.team.sum(s.network.parameters(), total)
    s.whole = False
    if s.config.optim.max_grad_norm:
        norm = s.accelerator.clip_grad_norm_(s.network.parameters(), s.config.optim.max_grad_norm)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in s.network.parameters() if p.grad is not None])
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
    largest = torch.nn.utils.get_total_norm([p.detach() for p in s.network.parameters()], math.inf)
    return torch.where(torch.isfinite(largest) | torch.isnan(total), total, math.inf), rates


def batch_loss(s: Session, batch: Batch) -> torch.Tensor:
    """The mean loss of a batch under torch's present random state; of a share, its part of that mean.

    The noise of a share is that of the whole batch; what dropout leaves out is drawn for each process.
    """
    latents = latents_of(s, batch)
    if batch.is_whole:
        text = text_of(s, batch.captions)
        return loss_per_image(s, batch, noised(s, latents), text).mean()
    whole = latents.new_zeros(batch.images, *latents.shape[1:])
    whole[batch.places] = latents
    drawn = tuple(tensor[batch.places] for tensor in noised(s, whole))
    set_torch_to(torch.initial_seed(), "share", s.team.place.rank)
    return loss_per_image(s, batch, drawn, text_of(s, batch.captions)).sum() / batch.images


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
        text = text_of(s, part.captions)
        here = some.to(latents.device)
        yield loss_per_image(s, part, tuple(tensor[here] for tensor in every), text).sum() / images


def latents_of(s: Session, batch: Batch) -> torch.Tensor:
    """A batch's latents [B,4,h,w] on the device: cached, or encoded now."""
    if batch.latents is not None:
        return batch.latents.to(s.accelerator.device)
    assert batch.pixels is not None
    among = None if batch.is_whole else (batch.places, batch.images)
    # The same draws of noise, however the VAE lays its answer out.
    return cache.encode(s.model, batch.pixels, batch.names, among=among).contiguous()


def text_of(s: Session, captions: list[str]) -> TextStates:
    """What the U-Net is told of captions: cached, or from the text encoders as they are now."""
    if s.captions:
        return s.captions.of(captions, s.accelerator.device)
    trained = any(p.requires_grad for p in s.network.parameters_of("text_encoder"))
    with nullcontext() if trained else torch.no_grad():
        return texts.answer(s.model, captions, s.config.captions)


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
    prediction = s.model.predict(noisy, timesteps, text, batch.sizes.to(device))
    wanted = objective.target(latents, noise, timesteps, schedule)
    weights = batch.weights.to(device)
    masks = None if batch.masks is None else batch.masks.to(device)
    return objective.loss_per_image(prediction, wanted, timesteps, weights, schedule, s.config.objective, masks)


def stops_text_encoder(s: Session, step: int) -> bool:
    """Whether the text encoder's share of the steps is over before this one."""
    percent = s.config.optim.stop_text_encoder_percent
    return bool(percent) and step > s.length.total_steps * percent / 100


def save(s: Session, step: int, due: Due) -> str:
    """Write the LoRA as it is now. Returns its path."""
    s.emit(Phase(f"saving {due.name}"))
    path, epoch = s.output / due.name, s.length.epoch_of(step)
    described = s.description.at(step, epoch, due.name.removesuffix(".safetensors"))
    if path not in s.written and (kept := checkpoint.set_aside(path)):
        s.emit(Warned(f'"{path}" was there already and is now "{kept.name}".'))
    s.written.add(path)
    checkpoint.save_lora(path, s.network, s.config.saving.precision, described)
    log.info("saved %s", path)
    is_last = step == s.length.total_steps
    s.emit(Saved(str(path), step, epoch, "final" if is_last else "intermediate"))
    prove(s, path, step)
    s.retention.wrote(due, path)
    if is_last and divides(s.config.saving.every_n_steps, step):
        s.retention.tidy("step", step)
    s.emit(Phase("training", step, s.length.total_steps))
    return str(path)


def prove(s: Session, path: Path, step: int) -> None:
    """Read a file that was just written, and tell whether it holds what was trained and who can load it."""
    trained = Expected(s.network.tensors(), s.config.saving.precision, s.model.family.name, step)
    verified = verify(path, trained)
    s.emit(verified)
    if verified.problems:
        hint = "Training goes on; do not rely on this file."
        s.emit(Warned(f'"{path.name}" was read back: {" ".join(verified.problems)}', hint))
    log.info("verified %s: %s", path.name, verified.summary)


def save_stopgap(s: Session, step: int) -> None:
    """Write a state that nobody asked for, so that a stopped or failed training can go on."""
    try:
        save_state(s, step, Due(checkpoint.file_name(s.config.saving.name, step=step)), stopgap=True)
    except (OSError, TrainingError) as error:
        s.emit(Warned(f"No state could be saved, so this run cannot go on later: {error}"))


def save_state(s: Session, step: int, due: Due, *, stopgap: bool = False) -> None:
    """Write the folder from which training goes on behind this step."""
    name = due.name.removesuffix(".safetensors") + "-state"
    s.emit(Phase(f"saving {name}"))
    checkpoint.sound(s.network.state_dict(), name)
    parts = state.parts_of(s.network, s.optimizer, s.scheduler, s.accelerator.scaler)
    path = checkpoint.on_disk(
        s.output / name,
        lambda folder: state.write(
            folder,
            step,
            s.seed,
            s.length.batches_per_epoch,
            s.config,
            parts,
            s.feed.pictures,
            stopgap=stopgap,
            returns=s.returns,
        ),
    )
    s.newest_state = path
    if s.resumed and s.resumed.folder != path:
        state.supersede(s.resumed)
    log.info("saved %s", path)
    s.emit(Saved(str(path), step, s.length.epoch_of(step), "state"))
    s.retention.wrote(due, path, is_state=True)
    s.emit(Phase("training", step, s.length.total_steps))


class Reporter:
    """Turns steps into events without making the device wait in each: losses are fetched together.

    Speed is that of the training alone, since the start or the last pause for other work. The average
    loss is over about the last tenth of the steps, at least 10 and at most 200.
    """

    def __init__(self, session: Session, forecast: Forecast) -> None:
        self.s = session
        self.forecast = forecast
        self._seen = 0
        self._average = 0.0
        self._waiting: list[tuple[int, torch.Tensor, dict[str, float]]] = []
        self._flushed = self._since = time.monotonic()
        self._steps = 0
        self._skipped = 0

    def add(self, step: int, loss: torch.Tensor, rates: dict[str, float]) -> None:
        """Take a step's result. Its event is written at most half a second after the step that follows."""
        if not self.s.team.leads:
            return
        self._waiting.append((step, loss, rates))
        if time.monotonic() - self._flushed > EVENTS_EVERY_S:
            self.flush()

    def forget(self) -> None:
        """Leave out what was not written yet: training goes on elsewhere."""
        self._waiting.clear()
        self._skipped = 0
        self.resume()

    def resume(self) -> None:
        """Time is measured anew from here."""
        self._flushed = self._since = time.monotonic()
        self._steps = 0

    def flush(self) -> None:
        """Write the events of all steps so far. Raises TrainingError at a loss that is not a number."""
        if not self._waiting:
            return
        losses = torch.stack([loss for _, loss, _ in self._waiting]).tolist()
        now = time.monotonic()
        self.forecast.stepped(len(losses), now - self._flushed)
        self._flushed = now
        self._steps += len(losses)
        speed = self._steps / max(1e-9, self._flushed - self._since)
        memory = memory_bytes(self.s.accelerator.device)
        for (step, _, rates), loss in zip(self._waiting, losses, strict=True):
            self._write(step, loss, rates, speed, memory)
        self._waiting.clear()

    def _write(self, step: int, loss: float, rates: dict[str, float], speed: float, memory: int) -> None:
        if not math.isfinite(loss):
            return self._skip(step, loss)
        self._skipped = 0
        self._seen += 1
        self._average += (loss - self._average) / min(self._seen, 200, max(10, self._seen / 10))
        length, epoch = self.s.length, self.s.length.epoch_of(step)
        left = self.forecast.seconds_left(step, length.total_steps)
        event = Step(
            step=step,
            total=length.total_steps,
            epoch=epoch,
            epochs=length.epochs,
            loss=loss,
            average_loss=self._average,
            unet_lr=rates.get("d*lr/unet", rates.get("unet")),
            text_encoder_lr=rates.get("d*lr/text_encoder", rates.get("text_encoder")),
            steps_per_s=round(speed, 4),
            seconds_left=None if left is None else round(left, 1),
            memory_bytes=memory,
        )
        self.s.emit(event)
        self.s.trackers.log({"loss/current": loss} | {f"lr/{name}": rate for name, rate in rates.items()}, step=step)
        log.info("step %d/%d  epoch %d  loss %.4f  %.2f steps/s", step, length.total_steps, epoch, loss, speed)

    def _skip(self, step: int, loss: float) -> None:
        """Tell of a step that was left out. Raises TrainingError when it was not, or was one too many."""
        s = self.s
        names = dict.fromkeys(shown(path) for n in s.length.batches_of(step) for path in s.feed.files(n))
        noun = "A weight behind" if math.isinf(loss) else "The loss or the gradient of"
        what = f"{noun} step {step} is not a number; its images: {', '.join(names)}."
        self._skipped += 1
        if self._skipped <= s.config.optim.most_skipped and not math.isinf(loss):
            s.emit(Warned(f"{what} It is left out.", "Look at these images; lower the learning rate if it comes back."))
            return
        raise TrainingError(
            "not_a_number",
            what + (f" {self._skipped} such steps in a row are too many." if self._skipped > 1 else ""),
            "Nothing of it was saved. Lower the learning rate, or set Mixed precision (mixed_precision) to bf16 or no, and "
            "go on from the last state or file. A single odd image: remove it, or raise Max skipped steps "
            "(max_skipped_steps).",
        )
