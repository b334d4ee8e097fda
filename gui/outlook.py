"""What would be trained with the form as it stands: images, steps, the network's size, memory and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from gui.runs import Runs
from trainer import events, kohya
from trainer.check import problems
from trainer.errors import ConfigError
from trainer.schema import PARAMETERS
from trainer.size import size_of

# What a step's time and memory depend on most.
ALIKE = (
    "pretrained_model_name_or_path",
    "LoRA_type",
    "network_dim",
    "train_batch_size",
    "max_resolution",
    "mixed_precision",
    "gradient_checkpointing",
    "gradient_accumulation_steps",
    "optimizer",
    "cache_latents",
    "xformers",
)
MOST_RUNS = 20


def outlook(values: Mapping[str, Any], runs: Runs) -> dict[str, Any]:
    """Summary, network's size and the last run that was like it; None for what is not known.

    It follows the form, so no images are decoded and no network is asked.
    """
    checked = problems(kohya.Preset(dict(values)), decode=False, ask=False)
    size = size_of(checked.config) if checked.config else None
    return {
        "summary": asdict(checked.summary),
        "errors": [asdict(problem) for problem in checked.errors],
        "size": asdict(size) if size else None,
        "like": _like(values, runs),
    }


def _like(values: Mapping[str, Any], runs: Runs) -> dict[str, Any] | None:
    """The newest run with the same cost a step: seconds a step, with its pictures and files, and memory."""
    wanted = _cost(values)
    for run_id in runs.ids()[:MOST_RUNS]:
        run = runs.find(run_id)
        assert run is not None
        tail = events.last(run.events)
        step = next((event for event in reversed(tail) if event["type"] == "step"), None)
        try:
            if step is None or not step["steps_per_s"] or _cost(kohya.load(run.config).values) != wanted:
                continue
        except ConfigError:
            continue  # a run whose settings cannot be read is like none
        return {"run": run_id, "seconds": 1 / step["steps_per_s"], "memory": step["memory_bytes"]}
    return None


def _cost(values: Mapping[str, Any]) -> list[str]:
    return [str(values.get(key, PARAMETERS[key].default)) for key in ALIKE]
