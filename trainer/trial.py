"""`python -m trainer check PRESET --trial`: three real steps and a picture, to know memory and time before the start.

The steps are the training's own, with a full batch of the bucket that takes the most, in a folder that goes again.
Nothing of the training is touched: no cache, no file, no tracker.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from trainer import kohya
from trainer.bench import peak_memory
from trainer.check import Checked
from trainer.data.buckets import Placement, Size
from trainer.data.folders import Picture
from trainer.errors import LorawrightError, Problem
from trainer.events import Event, Phase
from trainer.run import Run
from trainer.schema import Config, parse
from trainer.schema.memory import is_memory, savings

if TYPE_CHECKING:
    import torch

STEPS = 3
"""The first is slower, and the second has the optimizer's states beside it."""
TIGHT = 0.8
WITHOUT = {
    "cache_latents_to_disk": False,
    "cache_text_encoder_outputs_to_disk": False,
    "logging_dir": "",
    "log_with": "",
    "resume": "",
    "num_processes": 1,
    "max_train_steps": STEPS,
    "stop_text_encoder_training": 0,
}
"""What the trial has otherwise than the training."""


@dataclass(frozen=True)
class Trial:
    """What was measured, in bytes and seconds; None for what was not reached.

    `ended_in`: where memory was full, "" if it was not. `bucket`: width and height of what was tried, in batches of
    `images`. `memory`: the most, of the GPU's if there is one; `memory_there`: all there is. `seconds`: of the whole
    training, about. `savings`: what would lower the memory.
    """

    ended_in: str
    message: str
    device: str
    bucket: Size
    images: int
    memory: int
    memory_there: int
    step_seconds: float | None
    picture_seconds: float | None
    seconds: float | None
    savings: tuple[Problem, ...]

    @property
    def tight(self) -> bool:
        """Whether little or nothing is left of the memory."""
        return bool(self.ended_in) or self.memory > TIGHT * self.memory_there

    @property
    def lines(self) -> list[str]:
        """For a person to read."""
        there = f"{self.memory_there / 2**30:.1f} GB"
        tried = f"{self.images} of {self.bucket[0]}×{self.bucket[1]} pixels a batch"
        if self.ended_in:
            told = [f"Memory does not suffice: it was full in {self.ended_in} ({tried}; {there} there). {self.message}"]
        else:
            assert self.step_seconds and self.seconds
            picture = f", {self.picture_seconds:.1f} s a picture" if self.picture_seconds else ""
            told = [
                f"Tried on {self.device}, {tried}: {self.memory / 2**30:.1f} of {there} at most, "
                f"{self.step_seconds:.2f} s a step{picture}; about {_duration(self.seconds)} in all."
            ]
        return told + ([f"less memory: {saving}" for saving in self.savings] if self.tight else [])

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"tight": self.tight, "lines": self.lines}


def tried(preset: kohya.Preset, checked: Checked) -> Trial:
    """Measure. `checked`: what the check found, without errors. Raises a LorawrightError as a training does."""
    with tempfile.TemporaryDirectory(prefix="lorawright-") as folder:
        changed = kohya.read(preset.values | WITHOUT | {"output_dir": str(Path(folder) / "output")})
        try:
            return _Trying(parse(changed.values), checked, Run(Path(folder) / "run")).measure()
        except OSError as error:
            raise LorawrightError(f'"{error.filename}": {error.strerror}.') from error


class _Trying:
    """One trial, as far as it came."""

    def __init__(self, config: Config, checked: Checked, run: Run) -> None:
        self.config, self.checked, self.run = config, checked, run
        self.doing = "preparing"
        self.bucket: Size = (0, 0)
        self.images = 0
        self.all_images = checked.summary.images + checked.summary.regularisation
        self.took: dict[str, float] = defaultdict(float)
        self._since = time.monotonic()

    def measure(self) -> Trial:
        import torch

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        message, step, picture = "", None, None
        try:
            step, picture = self._steps_and_picture()
            self.doing = ""
        except (RuntimeError, MemoryError) as error:
            if not is_memory(error):
                raise
            message = str(error).splitlines()[0] if str(error) else ""
        return Trial(
            ended_in=self.doing,
            message=message,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
            bucket=self.bucket,
            images=self.images,
            memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory(),
            memory_there=_memory_there(device),
            step_seconds=step,
            picture_seconds=picture,
            seconds=None if step is None else self._in_all(step, picture),
            savings=tuple(savings(self.config)),
        )

    def _steps_and_picture(self) -> tuple[float, float | None]:
        """Seconds of one step, and of one picture where the training draws any."""
        from trainer import loop, optim, sampling
        from trainer.due import draws_samples
        from trainer.prepare import prepare

        session = prepare(self.config, self.run, self._heard, choose=self._heaviest)
        self._heard(Phase("steps"))
        session.network.attach()
        took = []
        batches = loop.batches_behind(session, 0)
        for step in range(1, STEPS + 1):
            began = time.perf_counter()
            float(loop.take_step(session, step, batches)[0])  # which waits for the device
            took.append(time.perf_counter() - began)
        picture = None
        if draws_samples(session):
            self._heard(Phase("drawing a picture"))
            resolution = self.config.data.resolution
            sizes = [(prompt.width or resolution[0], prompt.height or resolution[1]) for prompt in session.prompts]
            prompt, size = max(zip(session.prompts, sizes, strict=True), key=lambda one: one[1][0] * one[1][1])
            session.model.vae.to(session.accelerator.device)
            began = time.perf_counter()
            with optim.averaged(session.optimizer), session.network.without_dropout():
                texts = session.prompt_texts
                sampling.draw(session.model, prompt, self.config.samples.sampler, size, 0, texts=texts)
            picture = time.perf_counter() - began
        self._heard(Phase("end"))
        session.network.detach()
        return min(took[1:]), picture  # a mean would carry one hiccup of the machine through the whole training

    def _heard(self, event: Event) -> None:
        """Note how long each piece of work took, and say on standard error what is being done."""
        if isinstance(event, Phase) and event.name != self.doing:
            now = time.monotonic()
            self.took[self.doing] += now - self._since
            self.doing, self._since = event.name, now
            print(f"trying: {event.name}", file=sys.stderr)

    def _heaviest(self, pictures: Sequence[Picture], placements: Sequence[Placement]) -> list[int]:
        """The pictures of one full batch of the bucket whose batches have the most pixels, by their places."""
        of = defaultdict(list)
        for place, placement in enumerate(placements):
            of[placement.bucket].append(place)
        most = self.config.training.batch_size

        def batch(bucket: Size) -> int:
            return min(most, sum(pictures[place].repeats for place in of[bucket]))

        self.bucket = max(of, key=lambda bucket: bucket[0] * bucket[1] * batch(bucket))
        self.images = batch(self.bucket)
        return of[self.bucket][:most]

    def _in_all(self, step: float, picture: float | None) -> float:
        """Seconds of the whole training, but for its files: preparation, steps, pictures."""
        summary, samples = self.checked.summary, self.config.samples
        assert summary.total_steps and summary.epochs
        caching = sum(took for name, took in self.took.items() if name.startswith("caching"))
        prepared = sum(took for name, took in self.took.items() if name not in ("steps", "drawing a picture"))
        more_images = max(0, self.all_images / max(1, self.images) - 1)
        times = 1
        times += summary.total_steps // samples.every_n_steps if samples.every_n_steps else 0
        times += summary.epochs // samples.every_n_epochs if samples.every_n_epochs else 0
        prompts = len([line for line in samples.prompts.splitlines() if line.strip()])
        return prepared + caching * more_images + step * summary.total_steps + (picture or 0) * times * prompts


def _memory_there(device: torch.device) -> int:
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    total = psutil.virtual_memory().total
    try:  # a container may have less than the machine
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
