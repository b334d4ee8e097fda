"""Attention on a processor, PyTorch's own beside ours as products of matrices: time and error in bf16.

    python benchmarks/attention.py [--threads N] [--repeats 7]

Each size is that of one layer of a U-Net, forward and backward, in turn; the median is told. The error is the length of the
difference from float64, relative, the largest among the answer and the three gradients.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.nn import functional as F

from trainer.attention import by_products

SIZES = {  # heads, queries, keys, width of a head
    "SD 1.5 256×256, itself": (8, 1024, 1024, 40),
    "SD 1.5 256×256, caption": (8, 1024, 77, 40),
    "SD 1.5 256×256, one level down": (8, 256, 256, 80),
    "SD 1.5 512×512, itself": (8, 4096, 4096, 40),
    "SD 1.5 512×512, caption": (8, 4096, 77, 40),
    "SDXL 512×512, itself": (10, 1024, 1024, 64),
    "SDXL 1024×1024, itself": (10, 4096, 4096, 64),
}
WAYS = {"PyTorch": F.scaled_dot_product_attention, "products": by_products}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=7)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    columns = "".join(f"{f'{name}, ms':>16}{'error':>10}" for name in WAYS)
    print(f"{'':32}{columns}{'ratio':>8}")
    for name, size in SIZES.items():
        took, errors = compared(size, chosen.repeats)
        row = "".join(f"{1e3 * took[way]:16.2f}{errors[way]:10.1e}" for way in WAYS)
        print(f"{name:32}{row}{took['products'] / took['PyTorch']:8.2f}", flush=True)


def compared(size: tuple[int, int, int, int], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """The seconds and the error of each way at one size."""
    heads, queries, keys, width = size
    torch.manual_seed(0)
    shapes = [(1, count, heads, width) for count in (queries, keys, keys)]
    given = [torch.randn(shape).bfloat16().transpose(1, 2).requires_grad_() for shape in shapes]
    pull = torch.randn(1, heads, queries, width).bfloat16()
    exact = [x.detach().double().requires_grad_() for x in given]
    wanted = answers(F.scaled_dot_product_attention, exact, pull.double())
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repeats + 1):
        for way, attend in WAYS.items():
            began = time.perf_counter()
            answers(attend, given, pull)
            took[way].append(time.perf_counter() - began)
    errors = {
        way: max(float((a - b).norm() / b.norm()) for a, b in zip(answers(attend, given, pull), wanted, strict=True))
        for way, attend in WAYS.items()
    }
    return {way: statistics.median(times[1:]) for way, times in took.items()}, errors


def answers(attend, given: list[torch.Tensor], pull: torch.Tensor) -> list[torch.Tensor]:
    """The answer and the gradients of queries, keys and values."""
    answer = attend(*given)
    return [answer.detach(), *torch.autograd.grad(answer, given, pull)]


if __name__ == "__main__":
    main()
