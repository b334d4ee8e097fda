"""All randomness of a run follows from its seed and a position, so nothing has to be remembered.

The noise of batch 412, or the shuffling of the caption in its second place, is the same whether
training came there in one go or was resumed at 400, and with any number of loader workers.
"""

from __future__ import annotations

import hashlib
import random


def seed_for(seed: int, *position: int | str) -> int:
    """A 63-bit seed for one place in a run. Equal arguments give equal seeds, others unrelated ones."""
    text = "/".join(map(str, (seed, *position))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator_at(seed: int, *position: int | str) -> random.Random:
    """Python's generator for one place in a run."""
    return random.Random(seed_for(seed, *position))  # noqa: S311  not for secrets


def set_torch_to(seed: int, *position: int | str) -> None:
    """Set torch's own generators, on every device, to one place in a run."""
    import torch

    torch.manual_seed(seed_for(seed, *position))
