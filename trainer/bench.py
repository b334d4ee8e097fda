"""`python -m trainer bench`: how fast a preset trains on this machine, and where the time goes.

The steps are the trainer's own, on the preset's model and images; nothing is saved or drawn. Each step is
awaited here, which a training never does. The machine's matrix rate is that of one product of two square
matrices in the training's precision; the share of it that the steps reach counts the products, convolutions
and attention that a step really does, recomputed ones (gradient checkpointing) too.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from trainer import kohya
from trainer.check import problems
from trainer.errors import ConfigError, LorawrightError
from trainer.events import Event, Phase
from trainer.run import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, Run

if TYPE_CHECKING:
    import torch

WARM_UP = 3
SIDE = 2048
WITHOUT = {
    "save_every_n_epochs": 0,
    "save_every_n_steps": 0,
    "sample_every_n_epochs": 0,
    "sample_every_n_steps": 0,
    "resume": "",
    "num_processes": 1,
    "max_train_epochs": 0,
    "log_with": "",
}
"""What a measurement leaves out of a preset."""


@dataclass(frozen=True)
class Benchmark:
    """Times in seconds, memory in bytes, rates in operations a second."""

    device: str
    precision: str
    batch_size: int
    steps: int
    median_step: float
    slowest_step: float
    images_per_second: float
    waiting_for_data: float
    """A step's mean."""
    phases: dict[str, float]
    """Until the first step, by what was done."""
    first_step: float
    operations_per_step: float
    rate: float
    machine_rate: float
    memory: int
    """The most that the process held."""
    device_memory: int | None

    @property
    def share(self) -> float:
        return self.rate / self.machine_rate


def report(preset: kohya.Preset, path: Path, steps: int, *, as_json: bool = False) -> int:
    """Measure a preset, read from `path`, and print the table. Returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        changed = {"output_dir": folder, "max_train_steps": WARM_UP + steps + 1, **WITHOUT}
        checked = problems(kohya.read(preset.values | changed))
        if checked.config is None:
            print(ConfigError([p for p in checked.problems if p.severity == "error"]), file=sys.stderr)
            return EXIT_CONFIG
        try:
            found = measure(checked.config, steps, Path(folder))
        except LorawrightError as error:
            print(error, file=sys.stderr)
            return EXIT_FAILED
    told = {"preset": str(path), **asdict(found), "share": found.share}
    print(json.dumps(told) if as_json else _table(path, found))
    return EXIT_DONE


def measure(config: Any, steps: int, folder: Path) -> Benchmark:
    """Prepare a training, take its first steps and measure them. Raises a LorawrightError as a training does."""
    phases = _Phases()
    phases(Phase("starting Python and PyTorch"), since=psutil.Process().create_time())
    import torch

    from trainer.loop import take_step
    from trainer.prepare import COMPUTE, prepare

    session = prepare(config, Run(folder / "run"), phases)
    session.network.attach()
    device = session.accelerator.device
    waits: list[float] = []
    batches = _timed(session.feed.batches(range(session.length.total_batches)), waits)
    took = []
    phases(Phase("end"))
    for step in range(1, WARM_UP + steps + 1):
        began = time.perf_counter()
        take_step(session, step, batches)
        _await(device)
        took.append(time.perf_counter() - began)
    on_gpu = device.type == "cuda"
    device_memory = torch.cuda.max_memory_allocated(device) if on_gpu else None
    with torch.compiler.set_stance("force_eager"), _operations() as counter:
        take_step(session, WARM_UP + steps + 1, batches)
    measured = took[WARM_UP:]
    median = statistics.median(measured)
    size = config.training.batch_size * config.training.accumulation
    operations = float(counter.get_total_flops())
    return Benchmark(
        device=torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        precision=session.precision,
        batch_size=size,
        steps=steps,
        median_step=median,
        slowest_step=max(measured),
        images_per_second=size / median,
        waiting_for_data=sum(waits) / (WARM_UP + steps + 1),
        phases=phases.took,
        first_step=took[0],
        operations_per_step=operations,
        rate=operations / median,
        machine_rate=matrix_rate(COMPUTE[session.precision], device),
        memory=peak_memory(),
        device_memory=device_memory,
    )


def matrix_rate(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """Operations a second (a multiplication and an addition are two) in the best of some products [2048,2048]²."""
    import torch

    one, other = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        _await(device)
        began = time.perf_counter()
        one @ other
        _await(device)
        best = min(best, time.perf_counter() - began)
    return 2 * SIDE**3 / best


class _Phases:
    """Takes the events of the preparation; `took` is how long each phase was, by name."""

    def __init__(self) -> None:
        self.took: dict[str, float] = {}
        self._name, self._since = "", 0.0

    def __call__(self, event: Event, since: float | None = None) -> None:
        if isinstance(event, Phase) and event.name != self._name:
            now = since or time.time()
            if self._name:
                self.took[self._name] = self.took.get(self._name, 0.0) + now - self._since
            self._name, self._since = event.name, now


def _timed(batches: Iterator[Any], waits: list[float]) -> Iterator[Any]:
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        waits.append(time.perf_counter() - began)
        if batch is None:
            return
        yield batch


def _operations() -> Any:
    import torch
    from torch.ops import aten
    from torch.utils import flop_counter

    # Operators that the counter does not know: a LoRA's second product, and on a CPU attention and arranged convolutions.
    more = {
        aten.addmm_: lambda output, one, other, *_, **__: flop_counter.mm_flop(one, other),
        aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: (
            flop_counter.sdpa_flop_count(query, key, value)
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, query, key, value, *_, **__: (
            flop_counter.sdpa_backward_flop_count(grad, query, key, value)
        ),
    }
    if hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        more[torch.ops.mkldnn._convolution_pointwise] = lambda x, weight, *_, out_shape, **__: (
            flop_counter.conv_flop_count(x, weight, out_shape)
        )
        more[torch.ops.mkldnn._convolution_transpose_pointwise] = lambda x, weight, *_, out_shape, **__: (
            flop_counter.conv_flop_count(x, weight, out_shape, transposed=True)
        )
    return flop_counter.FlopCounterMode(display=False, custom_mapping=more)


def _await(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _table(path: Path, found: Benchmark) -> str:
    rows = [
        ("preset", str(path)),
        ("device, precision", f"{found.device}, {found.precision}"),
        (f"one step, median of {found.steps}", f"{found.median_step:.3f} s"),
        ("the slowest", f"{found.slowest_step:.3f} s"),
        (f"images, {found.batch_size} a step", f"{found.images_per_second:.2f} a second"),
        ("of a step, waiting for data", f"{found.waiting_for_data:.4f} s"),
        ("operations a step", f"{found.operations_per_step / 1e12:.3f} T"),
        (
            "reached",
            f"{found.rate / 1e9:.0f} G operations/s: {found.share:.0%} of the {found.machine_rate / 1e9:.0f} G/s at which "
            f"this machine multiplies matrices of {SIDE}×{SIDE}, the most that any step could reach",
        ),
        ("memory, at most", f"{found.memory / 2**30:.2f} GB"),
        *([("GPU memory, at most", f"{found.device_memory / 2**30:.2f} GB")] if found.device_memory else []),
        ("until the first step", f"{sum(found.phases.values()):.1f} s"),
        *((f"  {name}", f"{seconds:.1f} s") for name, seconds in found.phases.items()),
        ("the first step", f"{found.first_step:.3f} s"),
    ]
    return "\n".join(f"{name:36}{value}" for name, value in rows)
