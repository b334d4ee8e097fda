"""What is known of each family of base models before one is loaded: one row a family. Needs no torch.

Nothing else names a family: the schema, the check and the metadata ask these rows, the loop asks
the loaded model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

ASSETS = Path(__file__).parent.parent / "assets"
PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Layout:
    """How many blocks a U-Net has, and which of them have attention.

    `edge`: entries before the first and behind the last of them, which `attention` counts too.
    """

    down: int
    middle: int
    up: int
    attention: frozenset[int]
    edge: int = 0

    @property
    def total(self) -> int:
        return 2 * self.edge + self.down + self.middle + self.up


@dataclass(frozen=True)
class Encoder:
    """One text encoder of a family.

    `key`: its kohya name without "lora_". `part`: its folder and config in diffusers' layout. `prefix`: before
    its tensors' names in a single file. `naming`: whose names follow there. `projected`: whether its
    pooled answer is projected and used. `padding`: the token behind a text's end mark; None: more end marks.
    """

    key: str
    part: str
    prefix: str
    naming: Literal["clip", "open_clip"]
    projected: bool = False
    padding: int | None = None


@dataclass(frozen=True)
class Family:
    """A family of base models.

    `what`: in a sentence. `switch`: the control that claims this family ("", of one family only: that no control is on). `blocks`: of the
    U-Net, as block weights and dims count them. `size_conditioned`: whether `predict` wants the sizes.
    `clip_skip`: whether the text encoder's last layer is for the user to choose. `original_names`: whether
    kohya's names of the U-Net's layers follow the original layout instead of diffusers'.
    `versions`, `architectures`: ss_base_model_version and modelspec.architecture, by prediction.
    `resolution`: the side that the base model was trained at, pixels. `module`, `kind`: where its class is.
    """

    name: str
    title: str
    what: str
    switch: str
    encoders: tuple[Encoder, ...]
    blocks: Layout
    versions: Mapping[str, str]
    architectures: Mapping[str, str]
    module: str
    kind: str
    implementation: str = "diffusers"
    resolution: int = 512
    size_conditioned: bool = False
    clip_skip: bool = True
    original_names: bool = False

    @property
    def has_two_encoders(self) -> bool:
        return len(self.encoders) == 2

    @property
    def parts(self) -> dict[str, str]:
        """The folders of a diffusers model that are loaded, and what each is called in a message."""
        numbered = {
            e.part: "text encoder" + (f" {i}" if self.has_two_encoders else "") for i, e in enumerate(self.encoders, 1)
        }
        return {"unet": "U-Net", "vae": "VAE", **numbered}

    @cached_property
    def configs(self) -> dict[str, Any]:
        """The configs of a full-size model's parts, and of its noise schedule."""
        return json.loads((ASSETS / self.name / "configs.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    @property
    def width(self) -> int:
        """Of the text states that a full-size model's U-Net attends to."""
        return self.configs["unet"]["cross_attention_dim"]  # type: ignore[no-any-return]

    def entries(self, prediction: str) -> dict[str, str]:
        """What sd-scripts says of such a base model in a LoRA's metadata."""
        return {"ss_v2": str(self.switch == "v2"), "ss_base_model_version": self.versions[prediction]}


CLIP_L = "transformer.text_model."
SD_BLOCKS = Layout(12, 1, 12, frozenset({1, 2, 4, 5, 7, 8, 12, *range(16, 25)}))
SDXL_ARCHITECTURE = "stable-diffusion-xl-v1-base"
FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="sd1",
            title="Stable Diffusion 1.x",
            what="a Stable Diffusion 1.x model",
            switch="",
            encoders=(Encoder("te", "text_encoder", f"cond_stage_model.{CLIP_L}", "clip"),),
            blocks=SD_BLOCKS,
            versions={"epsilon": "sd_v1", "v_prediction": "sd_v1_v"},
            architectures=dict.fromkeys(PREDICTIONS, "stable-diffusion-v1"),
            module="trainer.models.sd",
            kind="StableDiffusion",
        ),
        Family(
            name="sd2",
            title="Stable Diffusion 2.x",
            what="a Stable Diffusion 2.x model",
            switch="v2",
            encoders=(Encoder("te", "text_encoder", "cond_stage_model.model.", "open_clip", padding=0),),
            blocks=SD_BLOCKS,
            versions={"epsilon": "sd_v2", "v_prediction": "sd_v2_v"},
            architectures={"epsilon": "stable-diffusion-v2-512", "v_prediction": "stable-diffusion-v2-768-v"},
            module="trainer.models.sd",
            kind="StableDiffusion",
        ),
        Family(
            name="sdxl",
            title="SDXL",
            what="an SDXL model",
            switch="sdxl",
            encoders=(
                Encoder("te1", "text_encoder", f"conditioner.embedders.0.{CLIP_L}", "clip"),
                Encoder(
                    "te2", "text_encoder_2", "conditioner.embedders.1.model.", "open_clip", projected=True, padding=0
                ),
            ),
            blocks=Layout(9, 3, 9, frozenset({5, 6, 8, 9, 11, *range(13, 19)}), edge=1),
            versions=dict.fromkeys(PREDICTIONS, "sdxl_base_v1-0"),
            architectures=dict.fromkeys(PREDICTIONS, SDXL_ARCHITECTURE),
            module="trainer.models.sdxl",
            kind="StableDiffusionXL",
            implementation="https://github.com/Stability-AI/generative-models",
            resolution=1024,
            size_conditioned=True,
            clip_skip=False,
            original_names=True,
        ),
    )
}
(UNCLAIMED,) = (family for family in FAMILIES.values() if not family.switch)
"""The one family without a switch: what nothing tells to be of another is taken to be of this."""
