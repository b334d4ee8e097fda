"""Settings drawn from the whole schema: what the check lets pass trains, stops and goes on exactly.

What is wrong with one setting alone has its own test; here they meet each other. A draw is told by its number:
`pytest tests/test_any_settings.py --draws 500:900` makes others than the ones of every day.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.test_training import of_type
from trainer import loop
from trainer.check import problems
from trainer.kohya import Preset
from trainer.run import EXIT_DONE, EXIT_STOPPED
from trainer.schema import PARAMETERS, Parameter
from trainer.schema.optimizers import OPTIMIZERS

STOP = 2
LEAST = {"max_train_steps": 4, "max_resolution": "128,128", "bucket_reso_steps": 64}
FAMILIES: list[dict[str, Any]] = [{}, {}, {}, {"v2": True, "v_parameterization": True}, {"sdxl": True}]
NUMBERS = (0, 0.01, 0.25, 1, 2, 3)
PROMPT = "a cat --n bad --s 1 --w 64 --h 64"
BLOCKS = ("", "", ",".join("2" * 25), ",".join("024" * 8 + "2"))
WEIGHTS = ("", "", "cosine+.25", "1,0.5,0")
# Where any value of the kind would say nothing, or lead elsewhere.
AMONG: dict[str, tuple[Any, ...]] = {
    "learning_rate": (1e-3, 1e-2),
    "unet_lr": ("", 0, 1e-3),
    "text_encoder_lr": ("", 0, 1e-3),
    "max_resolution": ("128,128", "128,64"),
    "bucket_reso_steps": (64,),
    "min_bucket_reso": (64,),
    "max_bucket_reso": ("", 128),
    "down_lr_weight": WEIGHTS,
    "mid_lr_weight": ("", 0.5, 0),
    "up_lr_weight": WEIGHTS,
    **dict.fromkeys(("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"), BLOCKS),
    "optimizer_args": ("", "weight_decay=0.1"),
    "lr_scheduler_args": ("", "num_cycles=2", "min_lr_rate=0.1", "step_rules=1:2,0.1", "num_decay_steps=1"),
    "sample_prompts": ("", PROMPT),
    "log_with": ("", "tensorboard"),
    "factor": (-1, 2, 8),
    "max_timestep": (0, 300, 1000),
    "min_timestep": (0, 200),
    "stop_text_encoder_training": (0, 60),
    "train_batch_size": (1, 2, 3),
    "save_precision": ("float", "bf16"),  # in fp16 the first steps of an optimizer that finds its own rate are nothing
    "optimizer": tuple(
        sorted(OPTIMIZERS.keys() - {"RAdamScheduleFree"})
    ),  # which leaves the weights alone in its first steps
    "training_comment": ("", "größer"),
}
# Where files are, what names the draw, how long it is, and what other machines or processes are needed for.
GIVEN = {
    *(key for key, p in PARAMETERS.items() if p.kind in ("file", "folder", "model", "secret")),
    *("v2", "v_parameterization", "sdxl", "model_list", "output_name", "caption_extension", "additional_parameters"),
    *("max_train_steps", "seed", "num_processes", "num_cpu_threads_per_process", "gpu_ids", "dynamo_backend"),
    *("wandb_run_name", "log_tracker_name"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    first, _, end = metafunc.config.getoption("--draws").partition(":")
    metafunc.parametrize("number", range(int(first), int(end)))


def drawn(number: int, settings: dict[str, Any], models: dict[str, Path]) -> dict[str, Any]:
    """The settings of a draw: the first ones of its random numbers that the check lets pass."""
    rng = random.Random(number)
    while True:
        family = rng.choice(FAMILIES)
        keys = rng.sample(sorted(PARAMETERS.keys() - GIVEN), rng.randint(8, 24))
        some = {key: rng.choice(values_of(PARAMETERS[key])) for key in keys}
        model = models[next(iter(family), "")]
        made = settings | {"pretrained_model_name_or_path": str(model)} | family | LEAST | some
        if not problems(Preset(made), decode=False).errors:
            return made


def values_of(parameter: Parameter) -> tuple[Any, ...]:
    if parameter.key in AMONG:
        return AMONG[parameter.key]
    if parameter.kind == "switch":
        return False, True
    if parameter.kind == "choice":
        return parameter.choices
    if parameter.kind in ("integer", "number"):
        numbers = (number for number in NUMBERS if parameter.kind == "number" or isinstance(number, int))
        return tuple(number for number in numbers if _is_allowed(parameter, number))
    return ("", "some words")


def _is_allowed(parameter: Parameter, number: float) -> bool:
    low, high, above = parameter.minimum, parameter.maximum, parameter.above
    return (low is None or number >= low) and (high is None or number <= high) and (above is None or number > above)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_what_the_check_lets_pass_trains_and_goes_on_exactly(
    number, settings, train, tmp_path, photographs, tiny_model, tiny_sd2, tiny_sdxl, monkeypatch
):
    images = shutil.copytree(photographs, tmp_path / "images")
    models = {"": tiny_model, "v2": tiny_sd2, "sdxl": tiny_sdxl}
    values = drawn(number, settings | {"train_data_dir": str(images)}, models)
    told = json.dumps({key: value for key, value in values.items() if value != settings.get(key)})

    def trained(*, stops: bool = False, **change: Any) -> dict[str, torch.Tensor]:
        with monkeypatch.context() as patch:
            if stops:
                patch.setattr(loop, "take_step", _stopping(loop.take_step))
            code, events, _ = train(values | change)
        assert code == (EXIT_STOPPED if stops else EXIT_DONE), (of_type(events, "failed"), told)
        assert all(not found["problems"] for found in of_type(events, "verified")), told
        return load_file(of_type(events, "ended")[-1]["path"])

    whole = trained()
    trained(stops=True, output_dir=str(tmp_path / "stopped"))
    resumed = trained(resume="auto", output_dir=str(tmp_path / "stopped"))
    assert whole.keys() == resumed.keys(), told
    assert [name for name, tensor in whole.items() if not torch.equal(tensor, resumed[name])] == [], told


def _stopping(step: Any) -> Any:
    def take_step(session: Any, number: int, batches: Any) -> Any:
        if number == STOP:
            session.run.request("stop")
        return step(session, number, batches)

    return take_step
