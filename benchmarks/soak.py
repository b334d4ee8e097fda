"""Kill a training at random moments, resume it, and see that nothing is lost.

    python benchmarks/soak.py --minutes 30 --seed 1

Trains a shortened presets/first-steps.json with the latents cached on disk, samples, LoRA files and states, on one
thread. Each training is ended while it starts, imports, loads, caches, saves, draws, writes a state or makes a step, by
SIGKILL or now and then by SIGTERM; where and how long after is drawn from `--seed`. After each kill every file that has
its final name must be whole, no process may be left, and the next start goes on from the newest state (resume = auto).
A training that reaches its end must have made the LoRA of one that was never killed, bit for bit. At last one long
training shows what memory does over time. Exit code 1 at the first thing that is otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from PIL import Image
from safetensors import safe_open

from trainer import events, state
from trainer.__main__ import main as command
from trainer.data.cache import FOLDER
from trainer.paths import DEMO
from trainer.run import EXIT_DONE, EXIT_STOPPED, Run

FORK = multiprocessing.get_context("fork")
ROOT = Path(__file__).parent.parent
STARTS_WITHIN_S = 120
GRACE_S = 30
LIBRARIES = (
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.schedulers.scheduling_euler_ancestral_discrete",
    "transformers.models.clip.modeling_clip",
)
MOST_GROWTH = 0.05
SIGTERMS = 0.15
"""The share of trainings that are ended by the gentler signal."""
MOMENTS: dict[str, float | tuple[str, str]] = {  # seconds within which, or how the event begins that is waited for
    "the first second": 1,
    "importing": 8,
    "starting": 8,
    "caching": ("phase", "caching latents"),
    "drawing": ("phase", "drawing samples"),
    "saving": ("phase", "saving linocut"),
    "saved": ("saved", ""),
    "stepping": ("step", ""),
}


class Broken(Exception):  # noqa: N818  no error of ours: what this program looks for
    """Something that a kill must not be able to do."""


def preset(work: Path, output: Path, steps: int) -> dict[str, object]:
    settings = json.loads((ROOT / "presets" / "first-steps.json").read_text())
    return settings | {
        "train_data_dir": str(work / "images"),
        "output_dir": str(output),
        "max_train_steps": steps,
        "train_batch_size": 2,
        "num_cpu_threads_per_process": 1,
        "cache_latents_to_disk": True,
        "save_state": True,
        "save_every_n_steps": max(2, steps // 6),
        "save_every_n_epochs": 0,
        "sample_every_n_epochs": 0,
        "sample_every_n_steps": max(2, steps // 4),
        "sample_prompts": "linocut, dog --d 1 --s 3 --l 4",
        "resume": "auto",
    }


def start(work: Path, number: int, settings: dict[str, object], *, fresh: bool = False) -> tuple[BaseProcess, Run]:
    run = Run(work / "runs" / f"{number:04d}")
    run.folder.mkdir(parents=True)
    path = work / "preset.json"
    path.write_text(json.dumps(settings))
    process = FORK.Process(target=train, args=(path, run, fresh))
    process.start()
    return process, run


def train(path: Path, run: Run, fresh: bool) -> None:
    """`python -m trainer train` in a process of its own, which has its libraries from its parent unless `fresh`."""
    os.setsid()
    with (run.folder / "output.txt").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    words = ["train", str(path), "--run", str(run.folder)]
    if fresh:
        os.execv(sys.executable, [sys.executable, "-m", "trainer", *words])
    sys.exit(command(words))


def stream(run: Run) -> list[dict[str, object]]:
    return [event for event, _ in events.read(run.events)] if run.events.exists() else []


def happened(run: Run, kind: str, name: str) -> int:
    return sum(e["type"] == kind and str(e.get("name", "")).startswith(name) for e in stream(run))


def kill_at(process: BaseProcess, run: Run, moment: str, number: signal.Signals, draw: random.Random) -> bool:
    """End the training by a signal. Returns whether it was, rather than over before its moment came."""
    when = MOMENTS[moment]
    if isinstance(when, tuple):
        wanted, deadline = draw.randint(1, 3), time.monotonic() + STARTS_WITHIN_S
        while happened(run, *when) < wanted and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.choice((0, 0.005, 0.02, 0.1, 0.5)) * draw.random())
    else:
        time.sleep(draw.uniform(0, when))
    family = [p.pid for p in psutil.Process().children(recursive=True) if p.pid != process.pid]
    if process.is_alive():
        assert process.pid
        os.kill(process.pid, number)
    process.join(GRACE_S)
    if process.is_alive():
        process.kill()
        process.join()
        raise Broken(f"{run.folder}: {number.name} did not end it within {GRACE_S} s")
    for _ in range(100):  # a worker sees within its next look that its parent is gone
        left = [pid for pid in family if psutil.pid_exists(pid)]
        if not left:
            break
        time.sleep(0.1)
    if left:
        raise Broken(f"{run.folder}: processes {left} outlive their trainer")
    return process.exitcode in (-number, EXIT_STOPPED)


def whole(work: Path, run: Run, output: Path) -> None:
    """Raise Broken for a file that has its final name and is not whole, and for a run that looks finished."""
    for path in [*output.glob("[!.]*.safetensors"), *(work / "images").rglob(f"{FOLDER}/[!.]*.safetensors")]:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    file.get_tensor(name)
        except Exception as error:
            raise Broken(f"{path} is not whole: {error}") from error
    for folder in output.glob("[!.]*-state"):
        state.read(folder).verify()
    for path in run.samples.glob("[!.]*.png"):
        with Image.open(path) as picture:
            picture.load()
    if run.events.exists():
        lines = run.events.read_bytes().split(b"\n")
        for line in lines[:-1]:
            json.loads(line)


def left_over(work: Path, output: Path, but_of: int | None) -> list[Path]:
    """Temporary files and folders, but for those of one process."""
    places: list[Iterator[Path]] = [place.rglob(".*.[0-9]*.*") for place in (output, work / "images")]
    return [path for place in places for path in place if f".{but_of}." not in path.name]


def tensors(path: Path) -> bytes:
    """A LoRA file without its metadata, which holds times."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header.pop("__metadata__", None)
    return json.dumps(header, sort_keys=True).encode() + data[end:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="no training is started after this long")
    parser.add_argument("--kills", type=int, default=10_000, help="nor after so many")
    parser.add_argument("--steps", type=int, default=24, help="of each whole training")
    parser.add_argument("--long", type=int, default=600, help="steps of the one whose memory is watched")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, help="a new folder (default: a temporary one)")
    asked = parser.parse_args()
    work = asked.work or Path(tempfile.mkdtemp(prefix="soak-"))
    shutil.copytree(DEMO / "images", work / "images", ignore=shutil.ignore_patterns(".*"))
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("trainer.loop", *LIBRARIES):  # once instead of in every training
        importlib.import_module(name)
    try:
        soak(work, asked)
    except Broken as broken:
        print(f"BROKEN: {broken}\nAll files are in {work}")
        return 1
    if not asked.work:
        shutil.rmtree(work)
    return 0


def soak(work: Path, asked: argparse.Namespace) -> None:
    draw, began = random.Random(asked.seed), time.monotonic()
    reference = tensors(uninterrupted(work, 0, asked.steps) / "linocut.safetensors")

    kills: Counter[str] = Counter()
    number = ended = resumed = gentle = 0
    output = work / "output"
    while time.monotonic() - began < asked.minutes * 60 and kills.total() < asked.kills:
        number += 1
        resumed += any(output.glob("[!.]*-state"))
        if draw.random() < 0.3:
            for folder in (work / "images").rglob(FOLDER):
                shutil.rmtree(folder)
        moment = draw.choice(list(MOMENTS))
        by = signal.SIGTERM if draw.random() < SIGTERMS else signal.SIGKILL
        fresh = moment in ("the first second", "importing")
        process, run = start(work, number, preset(work, output, asked.steps), fresh=fresh)
        killed = kill_at(process, run, moment, by, draw)
        kills[moment] += killed
        gentle += killed and by == signal.SIGTERM
        whole(work, run, output)
        past = stream(run)
        finished = any(e["type"] == "ended" and e["status"] == "done" for e in past)
        if not killed:
            if process.exitcode != EXIT_DONE or not finished:
                raise Broken(f"{run.folder} ended with exit code {process.exitcode}")
        elif any(e["type"] == "started" for e in past) and (old := left_over(work, output, process.pid)):
            raise Broken(f"{run.folder}: the start left {[str(path) for path in old]}")
        if finished or (output / "linocut-state").is_dir():  # with it, nothing is left to train
            if tensors(output / "linocut.safetensors") != reference:
                raise Broken(f"{run.folder} ended with another LoRA than the training without kills")
            ended += 1
            shutil.rmtree(output)
    places = ", ".join(f"{name} {count}" for name, count in kills.most_common())
    print(
        f"{kills.total()} kills ({places}), {gentle} of them by SIGTERM, in {(time.monotonic() - began) / 60:.1f} "
        f"minutes; {resumed} resumed starts"
    )
    print(f"{ended} trainings reached their end, each with the LoRA of the training without kills, bit for bit")
    print("after each kill every file was whole; no process and no temporary file outlived the next start", flush=True)
    watch_memory(uninterrupted(work, number + 1, asked.long).parent / "runs" / f"{number + 1:04d}")


def uninterrupted(work: Path, number: int, steps: int) -> Path:
    """A training without kills. Returns its output folder."""
    output = work / f"{steps} steps"
    process, run = start(work, number, preset(work, output, steps))
    process.join()
    if process.exitcode != EXIT_DONE:
        raise Broken(f"the training without kills failed: {run.folder}")
    return output


def watch_memory(folder: Path) -> None:
    """Tell how a training's memory moved over its four quarters. Raises Broken where it grows."""
    memory = [int(str(e["memory_bytes"])) for e in stream(Run(folder)) if e["type"] == "step"]
    quarter = len(memory) // 4
    means = [sum(memory[i * quarter : (i + 1) * quarter]) / quarter for i in range(4)]
    growth = means[3] / means[1] - 1
    print(
        f"memory of a training of {len(memory)} steps with its files, states and pictures, by quarters: "
        f"{', '.join(f'{mean / 1e6:.0f}' for mean in means)} MB; {growth:+.1%} from the second to the last"
    )
    if growth > MOST_GROWTH:
        raise Broken(f"memory grew by {growth:.1%}")


if __name__ == "__main__":
    sys.exit(main())
