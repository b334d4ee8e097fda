"""A stand-in for `python -m trainer` that needs no torch: it writes a run's events and nothing is learned.

How it behaves is said in the preset's `training_comment`, as words:
    steps=N  pause=SECONDS a step  crash  killed  exit=CODE  deaf (takes no requests)  silent (no steps at all)
    loss=FACTOR  state (one is saved after a quarter of the steps)
    room=MEGABYTES (no stand-in: the real trainer, which may take that much more than its libraries do)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from trainer.events import Ended, EventLog, Failed, Phase, Sample, Saved, Started, Step, Verified, Warned
from trainer.run import Run


def check(path: Path, *, trial: bool = False) -> int:
    from trainer import kohya
    from trainer.errors import ConfigError
    from trainer.schema import parse

    preset = kohya.load(path)
    try:
        parse(preset.values)
    except ConfigError as error:
        found = [problem.__dict__ for problem in error.problems]
        print(json.dumps({"problems": found, "notes": [], "summary": {}}))
        return 2
    notes = [note.__dict__ for note in preset.notes]
    summary = {
        "images": 4,
        "buckets": [[64, 64, 4]],
        "repeats": 8,
        "total_steps": 80,
        "epochs": 10,
        "model": "Fake Diffusion",
    }
    saving = {"key": "gradient_checkpointing", "label": "Gradient checkpointing", "message": "switch it on."}
    line = "Tried on the CPU, 4 of 64×64 pixels a batch: 3.9 of 4.0 GB at most, 0.50 s a step; about 40 s in all."
    if trial and "slow" in preset.values.get("training_comment", ""):
        time.sleep(60)
    measured = {"trial": {"ended_in": "", "tight": True, "lines": [line], "savings": [saving]}} if trial else {}
    print(json.dumps({"problems": [], "notes": notes, "summary": summary, **measured}))
    return 0


def train(path: Path, folder: Path) -> int:
    values = json.loads(path.read_text())
    words = dict(word.partition("=")[::2] for word in str(values.get("training_comment", "")).split())
    total, pause = int(words.get("steps", 20)), float(words.get("pause", 0.02))
    if "room" in words:
        train_for_real(int(words["room"]) << 20)
    run = Run(folder)
    run.claim()
    events = EventLog(run.events)
    print("fake trainer\nloading:  10%\rloading: 100%\nümlaut 🐈", flush=True)
    events.emit(Phase("loading the base model"))
    time.sleep(pause)
    events.emit(Phase("caching latents", 2, 4))
    time.sleep(pause)
    past = values.get("resume") or ""
    past = "" if past == "auto" else past
    first = 1 + (json.loads(next(Path(past).glob("*.json")).read_text())["step"] if past else 0)
    events.emit(Started("fake", "Fake Diffusion", "cpu", "no", 4, 8, 10, total, first, 42, past))
    if "silent" in words:
        time.sleep(60)
    prompts = [p for p in str(values.get("sample_prompts", "")).splitlines() if p] or ["a cat", "a dog"]
    sample(run, events, 0, prompts)
    events.emit(Warned("Mixed precision fp16 needs a GPU; bf16 is used instead.", "Set Mixed precision to bf16 or no."))
    offset = 0
    for step in range(first, total + 1):
        time.sleep(pause)
        average = (0.1 + 0.3 * math.exp(-step / 40)) * float(words.get("loss", 1))
        loss = average + 0.03 * math.sin(step * 12.9)
        left = (total - step) * pause if step >= 10 else None
        speed, memory = 1 / (pause + 0.001), 3 * 2**30
        events.emit(Step(step, total, 1 + step // 8, 10, loss, average, 1e-4, 5e-5, speed, left, memory))
        if step == total // 4 and "state" in words:
            events.emit(Saved(str(state(run.output / "last-state", step)), step, 1, "state"))
        if step == total // 2:
            for word in words:
                if word == "crash":
                    print("Traceback (most recent call last):\nMemoryError", flush=True)
                    events.emit(Failed("out_of_memory", "The memory is full.", "Lower Train batch size."))
                    return 1
                if word == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if word == "exit":
                    print("something odd happened", flush=True)
                    return int(words["exit"])
        asked, offset = run.requests(offset) if "deaf" not in words else ([], 0)
        if "sample" in asked or step % max(1, total // 4) == 0:
            sample(run, events, step, prompts)
        if "save" in asked:
            save(run, events, step, "intermediate")
        if "stop" in asked:
            path = save(run, events, step, "final")
            events.emit(Ended("stopped", step, path, 1.0))
            return 3
    events.emit(Ended("done", total, save(run, events, total, "final"), 1.0))
    return 0


def train_for_real(room: int) -> NoReturn:
    """The real training, whose requests for memory are refused from `room` bytes on."""
    import resource

    import trainer.loop  # noqa: F401
    from trainer.__main__ import _leave, main

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + room, held + room))
    _leave(main())


def sample(run: Run, events: EventLog, step: int, prompts: list[str]) -> None:
    from PIL import Image

    run.samples.mkdir(exist_ok=True)
    for index, prompt in enumerate(prompts):
        path = run.samples / f"{step:06d}_{index}.png"
        Image.new("RGB", (96, 96), (40 * (index + 1) % 255, step * 5 % 255, 160)).save(path)
        events.emit(Sample(f"samples/{path.name}", prompt, index, 7, step))


def state(folder: Path, step: int) -> Path:
    """A whole state's folder, with tensors of no use."""
    from trainer.state import FORMAT, HEADER, TENSORS, VERSION

    folder.mkdir(parents=True, exist_ok=True)
    (folder / TENSORS).write_bytes(b"1234")
    header = {"format": FORMAT, "version": VERSION, "step": step, "seed": 1, "batches_per_epoch": 8}
    digest = hashlib.blake2b(b"1234", digest_size=16).hexdigest()
    more = {"settings": {}, "bytes": 4, "digest": digest, "parts": {}}
    (folder / HEADER).write_text(json.dumps(header | more))
    return folder


def save(run: Run, events: EventLog, step: int, what: str) -> str:
    run.output.mkdir(exist_ok=True)
    path = run.output / ("last.safetensors" if what == "final" else f"last-step{step:08d}.safetensors")
    path.write_bytes(b"not really weights" * 100)
    events.emit(Saved(str(path), step, 1, what))
    checks = ("12 tensors of 4 layers, each known by name and shape", "all numbers are finite")
    events.emit(
        Verified(
            str(path), checks, (), ("It is rather small.",), ("diffusers", "ComfyUI"), {"Other UI": "knows no LoKr"}
        )
    )
    return str(path)


def truly(words: list[str]) -> NoReturn:
    """The real program, whose doctor leaves out its minute of training."""
    from trainer import doctor
    from trainer.__main__ import _leave, main

    doctor.LOOKS = (doctor._writing, doctor._room)
    if any("pause=60" in word for word in words):  # in a prompt
        time.sleep(60)
    _leave(main(words))


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "check":
        sys.exit(check(Path(rest[0]), trial="--trial" in rest))
    if command == "train":
        sys.exit(train(Path(rest[0]), Path(rest[2])))
    truly(sys.argv[1:])
