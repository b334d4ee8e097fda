"""How long a warm cache of latents takes to read: `python benchmarks/latents.py --pictures 1000`.

The entries are those of pictures at 512×512, as a training writes them; a VAE is not asked.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

from trainer.data import cache
from trainer.data.buckets import Placement
from trainer.data.folders import Picture

SIDE = 512
PLACEMENT = Placement((SIDE, SIDE), (SIDE, SIDE), (0, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    model = SimpleNamespace(vae=torch.nn.Identity())
    with tempfile.TemporaryDirectory() as folder:
        pictures = [written(Path(folder) / f"{i:05d}.png") for i in range(asked.pictures)]
        store = cache.DiskCache(model, torch.float16, flip=False)
        for picture in pictures:
            store.write(picture, PLACEMENT, cache.Latents(torch.randn(4, SIDE // 8, SIDE // 8).half()))
        took = [read(pictures, model) for _ in range(asked.rounds)]
    print(
        f"{asked.pictures} latents of {SIDE}×{SIDE} from a warm cache: {1000 * statistics.median(took):.0f} ms "
        f"(median of {asked.rounds}), {1000 * statistics.median(took) / asked.pictures:.2f} ms each"
    )


def written(path: Path) -> Picture:
    Image.new("RGB", (SIDE, SIDE), (90, 60, 30)).save(path)
    return Picture(path, "", 1, (SIDE, SIDE), "", False, "")


def read(pictures: list[Picture], model: object) -> float:
    """Seconds until all are in memory. A model without `encode` shows that none was made anew."""
    began = time.perf_counter()
    cache.encode_all(
        pictures,
        [PLACEMENT] * len(pictures),
        model,
        flip=False,
        batch_size=1,
        dtype=torch.float16,
        to_disk=True,
        progress=lambda done, total: None,
    )
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
