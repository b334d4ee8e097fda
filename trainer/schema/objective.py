"""Noise and loss."""

from typing import Literal

from trainer.schema.declare import Group, Section, parameter

HUBER = ("huber", "smooth_l1")


class Objective(Group):
    loss_type: Literal["huber", "smooth_l1", "l1", "l2"] = parameter(
        "loss_type",
        "l2",
        "Loss type",
        Section.LOSS,
        """How the difference between the model's answer and the wanted one is counted. l2, its
        square, is what the base models were trained with. huber, smooth_l1 and l1 let single large
        differences weigh less, which helps with flawed or mixed images; results get a little
        softer.""",
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = parameter(
        "huber_schedule",
        "snr",
        "Huber schedule",
        Section.LOSS,
        """Where huber and smooth_l1 change from squares to plain differences: at the same value
        always (constant), or at one that falls from 1 to Huber C as the picture gets noisier, by
        the timestep (exponential) or by the share of noise (snr, the usual choice).""",
        when={"loss_type": HUBER},
    )
    huber_c: float = parameter(
        "huber_c",
        0.1,
        "Huber C",
        Section.LOSS,
        """The value at which squares end, at the noisiest timestep. Lower forgives more outliers;
        0.1 is usual.""",
        gt=0,
        le=1,
        when={"loss_type": HUBER},
    )
    huber_scale: float = parameter(
        "huber_scale",
        1.0,
        "Huber scale",
        Section.LOSS,
        """Multiplies that value with the schedules constant and exponential; snr does not use
        it.""",
        gt=0,
        when={"loss_type": HUBER, "huber_schedule": ("constant", "exponential")},
    )
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
    debiased: bool = parameter(
        "debiased_estimation_loss",
        False,
        "Debiased Estimation loss",
        Section.LOSS,
        """The opposite of Min SNR gamma: noisy timesteps count more (weight 1 ÷ √SNR), so shapes
        and composition are learned sooner and colours drift less. Use one of the two.""",
    )
    zero_terminal_snr: bool = parameter(
        "zero_terminal_snr",
        False,
        "Zero terminal SNR",
        Section.NOISE,
        """The noisiest timestep is nothing but noise, so that very dark and very bright pictures can be learned. Only
        for base models that were trained so (NoobAI v-pred and others with v-prediction).""",
        when={"v_parameterization": True},
    )
    scale_v_loss: bool = parameter(
        "scale_v_pred_loss_like_noise_pred",
        False,
        "Scale v prediction loss",
        Section.LOSS,
        """For v-prediction models only: timesteps count as much as they would in a model that
        predicts noise, which can bring out finer detail.""",
        when={"v_parameterization": True},
    )
    v_like_loss: float = parameter(
        "v_pred_like_loss",
        0.0,
        "V Pred like loss",
        Section.LOSS,
        """For models that predict noise: adds this share of the loss a v-prediction model would
        have, so that very noisy timesteps count more. 0.5 is a good try; 0: off.""",
        ge=0,
        le=1,
        when={"v_parameterization": False},
    )
    masked: bool = parameter(
        "masked_loss",
        False,
        "Masked loss",
        Section.LOSS,
        """Learn only what the images' alpha channel shows: opaque parts count in full, transparent
        ones not at all. For cut-out subjects as PNG or WebP; images without transparency count
        whole.""",
    )
    min_timestep: int = parameter(
        "min_timestep",
        0,
        "Min Timestep",
        Section.NOISE,
        """The least noise that is trained with, 0 to 999 of 1000. Above 0 the finest detail is left
        as the base model has it.""",
        ge=0,
        le=999,
    )
    max_timestep: int = parameter(
        "max_timestep",
        1000,
        "Max Timestep",
        Section.NOISE,
        """The noise that is not reached any more, 1 to 1000; equal to Min Timestep, only that one
        is trained. Below 1000 composition is left as the base model has it. 0 is taken as 1000.""",
        ge=0,
        le=1000,
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
    noise_offset_random: bool = parameter(
        "noise_offset_random_strength",
        False,
        "Noise offset random strength",
        Section.NOISE,
        """Each batch draws its offset between 0 and the value above, instead of always using all of
        it.""",
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
    ip_noise_gamma: float = parameter(
        "ip_noise_gamma",
        0.0,
        "IP noise gamma",
        Section.NOISE,
        """Input perturbation: the model sees this much more noise than it is asked to find, so it
        learns to cope with its own small errors. 0.1 is usual; 0: off.""",
        ge=0,
        le=1,
    )
    ip_noise_gamma_random: bool = parameter(
        "ip_noise_gamma_random_strength",
        False,
        "IP noise gamma random strength",
        Section.NOISE,
        """Each batch draws that strength between 0 and the value above.""",
    )
