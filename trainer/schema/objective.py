"""Noise and loss."""

from typing import Literal

from trainer.schema.declare import Group, Section, parameter


class Objective(Group):
    min_snr_gamma: float = parameter(
        "min_snr_gamma",
        0.0,
        "Min SNR gamma",
        Section.LOSS,
        """Steps with little noise count less, so that they don't drown the others: weight
        min(SNR, γ) ÷ SNR. 5 is the paper's value and often helps; 0: off.""",
        ge=0,
        le=20,
    )
    noise_type: Literal["Original", "Multires"] = parameter(
        "noise_offset_type",
        "Original",
        "Noise offset type",
        Section.NOISE,
        """Two ways to let the model learn very dark and very bright pictures: one added value per
        picture (Original), or noise of several sizes (Multires).""",
    )
    noise_offset: float = parameter(
        "noise_offset",
        0.0,
        "Noise offset",
        Section.NOISE,
        """Strength of the added value, 0 to 1; 0.05–0.1 makes colours deeper. 0: off.""",
        ge=0,
        le=1,
        when={"noise_offset_type": "Original"},
    )
    adaptive_noise_scale: float = parameter(
        "adaptive_noise_scale",
        0.0,
        "Adaptive noise scale",
        Section.NOISE,
        """Adds this times the latent's mean strength to the offset, −1 to 1: bright or dark
        pictures get more (or less). Needs a noise offset.""",
        ge=-1,
        le=1,
        when={"noise_offset_type": "Original"},
    )
    multires_iterations: int = parameter(
        "multires_noise_iterations",
        0,
        "Multires noise iterations",
        Section.NOISE,
        """How many sizes of noise are added up; 6 is usual. 0: off.""",
        ge=0,
        le=64,
        when={"noise_offset_type": "Multires"},
    )
    multires_discount: float = parameter(
        "multires_noise_discount",
        0.0,
        "Multires noise discount",
        Section.NOISE,
        """How much of each coarser size remains, 0 to 1. 0.8 for many images, 0.1–0.3 for few. 0 is
        taken as 0.3.""",
        ge=0,
        le=1,
        when={"noise_offset_type": "Multires"},
    )
