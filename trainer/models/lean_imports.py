"""The classes that base models are made of, imported without all other models of their libraries.

diffusers' packages import each of their models when the first is asked for, forty transformers and with bitsandbytes
PyTorch's compiler; transformers reads the source of each of its models. Half of the files are enough: seconds at
every start, and many from a disk that has not read them yet.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

PACKAGES = (
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "diffusers.models.unets",
    "transformers.models",
)


class _WithoutContent:
    """Finds the packages as bare folders, whose modules can be imported one by one."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in PACKAGES or not (found := PathFinder.find_spec(name, path)):
            return None
        bare = ModuleSpec(name, None, is_package=True)
        bare.submodule_search_locations = found.submodule_search_locations
        return bare


@contextmanager
def _only_what_is_named() -> Iterator[None]:
    """Import no more of the packages than what is named, and nothing of bitsandbytes, which reads quantised models.

    Whoever asks for the packages later gets them whole.
    """
    missing = {"bitsandbytes", *PACKAGES} - set(sys.modules)
    if "bitsandbytes" in missing:
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  Python's sign for what cannot be imported
        if asked := sys.modules.get("diffusers.utils.import_utils"):  # what it found then it believes for good
            vars(asked)["_bitsandbytes_available"] = False
    sys.meta_path.insert(0, _WithoutContent)
    try:
        yield
    finally:
        sys.meta_path.remove(_WithoutContent)
        for name in missing:
            sys.modules.pop(name, None)
            package, _, own = name.rpartition(".")
            if holder := sys.modules.get(package):  # none is there if the import failed, and that is to be told
                vars(holder).pop(own, None)


with _only_what_is_named():
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

__all__ = ["AutoencoderKL", "CLIPTextConfig", "CLIPTextModel", "CLIPTextModelWithProjection", "UNet2DConditionModel"]
