"""Models named as on huggingface.co (OWNER/NAME): asked for, fetched once into that library's cache. Needs no torch."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.errors import ModelError

TIMEOUT_S = 5
EVERY_S = 0.5
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
CONFIG = re.compile(rf"model_index\.json|scheduler/scheduler_config\.json|({'|'.join(PARTS)})/config\.json")
WORD = r"\w(?:[\w.-]{0,94}\w)?"  # as its names are
WEIGHTS = re.compile(
    rf"({'|'.join(PARTS)})/(diffusion_pytorch_model|model)\.[\w.-]*(safetensors|safetensors\.index[\w.]*\.json)"
)
NAME = re.compile(rf"(?!.*(?:--|\.\.|\.git$)){WORD}/{WORD}", re.ASCII)
Progress = Callable[[int, int], None]


def is_name(source: str) -> bool:
    """Whether the text has the form of a model's name there, and is no path here."""
    name = source.strip()
    return bool(NAME.fullmatch(name)) and not Path(name).exists()


def folder(name: str) -> Path | None:
    """The model's folder in the cache, where its weights are all there; no network is asked."""
    found = _cached(name)
    return found if found and _has_all_weights(found) else None


def configs(name: str) -> Path:
    """The model's folder in the cache with at least its configs, fetched where they are not there (some kB).

    Raises ModelError where there is no network, no such model, or none in diffusers' layout.
    """
    return folder(name) or _fetch(name, [file for file in files(name) if file.endswith(".json")], lambda n: None)


def fetch(name: str, progress: Progress = lambda done, total: None) -> Path:
    """The model's folder in the cache with all that training needs, fetched where it is not there.

    `progress(done, total)` is told in bytes and may raise to end it; what was fetched stays for the next
    time. Raises ModelError as `configs` does.
    """
    if found := folder(name):
        return found
    wanted = files(name)
    done, told, total = 0, 0.0, sum(wanted.values())

    def add(count: int) -> None:
        nonlocal done, told
        done += count
        if time.monotonic() - told > EVERY_S or done == total:
            told = time.monotonic()
            progress(done, total)

    progress(0, total)
    return _fetch(name, list(wanted), add)


def files(name: str) -> dict[str, int]:
    """What training needs of the model → bytes, configs first. 16-bit weights where all parts have them.

    Raises ModelError as `configs` does.
    """
    from huggingface_hub import HfApi

    with _in_our_words(name):
        info = HfApi().model_info(name, files_metadata=True, timeout=TIMEOUT_S)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    weights = {file: size for file, size in sizes.items() if WEIGHTS.fullmatch(file)}
    parts = {file.partition("/")[0] for file in weights}
    if "model_index.json" not in sizes or not {"unet", "vae", "text_encoder"} <= parts:
        single = sorted(file for file in sizes if file.endswith(".safetensors") and "/" not in file)
        raise ModelError(
            f'"{name}" on huggingface.co has no safetensors weights in diffusers\' layout.',
            f"Download its file {single[0]} and enter its path." if single else "Choose another model.",
        )
    half = {file: size for file, size in weights.items() if ".fp16" in file}
    if {file.partition("/")[0] for file in half} != parts:
        half = {file: size for file, size in weights.items() if ".fp16" not in file and ".non_ema" not in file}
    return {file: size for file, size in sizes.items() if CONFIG.fullmatch(file)} | half


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "model_index.json")
    return Path(found).parent if isinstance(found, str) else None


def _has_all_weights(folder: Path) -> bool:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for part in PARTS:
        if not isinstance(index.get(part), list) or index[part][0] is None:
            continue
        names = {file.name for file in (folder / part).glob("*.safetensors")}
        for listing in (folder / part).glob("*.safetensors.index*.json"):
            if set(json.loads(listing.read_text(encoding="utf-8"))["weight_map"].values()) - names:
                return False
        if not names or not (folder / part / "config.json").is_file():
            return False
    return True


def _fetch(name: str, wanted: list[str], add: Callable[[int], None]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm

    class Meter(tqdm):  # type: ignore[type-arg,misc]
        """The library's progress bar, told to us instead of the terminal."""

        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **{**settings, "file": io.StringIO(), "disable": False})
            add(int(self.n))

        def update(self, n: float | None = 1) -> bool | None:
            add(int(n or 0))
            return super().update(n)

    paths: Mapping[str, str] = {}
    with _in_our_words(name):
        paths = {file: hf_hub_download(name, file, tqdm_class=Meter) for file in wanted}
    return Path(paths["model_index.json"]).parent


@contextmanager
def _in_our_words(name: str) -> Iterator[None]:
    """The library's errors become ModelErrors."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f'"{name}" is on huggingface.co, but its owner asks for your consent first.',
            f"Accept its terms on https://huggingface.co/{name}, then log in on this machine (hf auth login).",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f'There is neither a path "{name}" on this machine nor, for you, a model of that name on huggingface.co.',
            "Correct it; for a private model log in first (hf auth login).",
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise ModelError(
            f'"{name}" is the name of a model on huggingface.co, and HF_HUB_OFFLINE forbids asking there.',
            "Unset it, or enter the path of a model on this machine.",
        ) from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError, errors.FileMetadataError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f'"{name}" is the name of a model on huggingface.co, which cannot be reached from here ({reason}).',
            f"Download it elsewhere (hf download {name} --local-dir FOLDER), and enter the path of that folder.",
        ) from error
