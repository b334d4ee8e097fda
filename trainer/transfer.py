"""Tensors on their way to the device."""

from __future__ import annotations

import torch


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the main memory on the device; the host goes on while it is copied.

    From memory that is not pinned CUDA copies only when all that it was given before is done, and the host waits.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    # On a Mac the memory could be used for something else before it is copied.
    return tensor.to(device, non_blocking=device.type != "mps")
