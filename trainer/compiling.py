"""The U-Net's repeated blocks, compiled by torch.compile where that pays; never a reason for a training to end.

Only the transformer blocks (diffusers' `compile_repeated_blocks`): three graphs serve the sixteen of SD 1.5, so that
they are made in a minute and are on the disk for the next start. Pictures are drawn without them.
"""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from trainer.networks import Network
from trainer.schema import Config

log = logging.getLogger(__name__)
BACKEND = "inductor"
ENOUGH_STEPS = 1000
ENOUGH_WEIGHTS = 100_000_000
"""Of the U-Net: a smaller one's steps cost nothing that compiling could save."""
MOST_GRAPHS = 64
"""Of one block's code: as many widths, sizes and modes as a training may have."""
# Among the user's own files, not in a folder that others could fill; PyTorch settles it when its compiler is imported.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "lorawright" / "compiled"))


def begin(model: Any, network: Network, config: Config, *, steps: int, sizes: int, device: torch.device) -> bool:
    """Have the U-Net's blocks compiled when they are first called, if the settings want that or it pays.

    By itself never for networks that draw, whose blocks would be compiled for each unit of ranks.
    `steps`: of the whole training, so that it is decided alike when it is resumed. `sizes`: how many buckets there are.
    """
    wanted = config.training.compiler
    if wanted == "no" or (wanted == "auto" and (network.draws or not pays(model.unet, config, steps, device))):
        return False
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    # A dropped value is the same one, compiled or not.
    torch._inductor.config.fallback_random = True
    model.unet.compile_repeated_blocks(backend=BACKEND, dynamic=True if sizes > 1 else None)
    log.info("the U-Net's repeated blocks are compiled in the first step")
    return True


def pays(unet: torch.nn.Module, config: Config, steps: int, device: torch.device) -> bool:
    """Whether a training earns back the minute: on a GPU, with a full-size model, in a run that is long enough.

    On a processor a step gains a few percent (docs/measured.md).
    """
    training, network = config.training, config.network
    plain = training.base_bits == "16" and not (training.fp8_base or training.fp8_base_unet or network.module_dropout)
    return (
        device.type == "cuda"
        and find_spec("triton") is not None
        and plain
        and steps >= ENOUGH_STEPS
        and sum(weight.numel() for weight in unet.parameters()) >= ENOUGH_WEIGHTS
    )


def end(model: Any) -> None:
    """The blocks are computed as they are written again."""
    for module in model.unet.modules():
        module._compiled_call_impl = None
