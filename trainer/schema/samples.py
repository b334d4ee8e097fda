"""Sample pictures during training."""

from typing import Literal

from trainer.schema.declare import Group, Section, parameter

Sampler = Literal[
    "ddim",
    "pndm",
    "lms",
    "euler",
    "euler_a",
    "heun",
    "dpm_2",
    "dpm_2_a",
    "dpmsolver",
    "dpmsolver++",
    "dpmsingle",
    "k_lms",
    "k_euler",
    "k_euler_a",
    "k_dpm_2",
    "k_dpm_2_a",
]


class Samples(Group):
    every_n_steps: int = parameter(
        "sample_every_n_steps",
        0,
        "Sample every n steps",
        Section.SAMPLES,
        """Draw each prompt after every N steps, with the LoRA as it is then, and once before the
        first step for comparison. 0: off.""",
        ge=0,
    )
    every_n_epochs: int = parameter(
        "sample_every_n_epochs",
        0,
        "Sample every n epochs",
        Section.SAMPLES,
        """The same at the end of every Nth epoch. 0: off.""",
        ge=0,
    )
    sampler: Sampler = parameter(
        "sample_sampler",
        "euler_a",
        "Sample sampler",
        Section.SAMPLES,
        """The method that draws the samples, by the web UIs' names. It has no influence on
        training.""",
    )
    prompts: str = parameter(
        "sample_prompts",
        "",
        "Sample prompts",
        Section.SAMPLES,
        """One prompt a line; # starts a comment. Flags at the end of a line: --n negative prompt,
        --w width, --h height, --d seed, --l CFG scale, --s steps. Brackets are text and weigh nothing. Up to 225
        tokens are read, whatever Max Token Length is.""",
        kind="lines",
        placeholder="a cat on a roof, evening --n blurry --w 512 --h 512 --d 1 --l 7.5 --s 28",
    )
