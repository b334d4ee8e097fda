"""Optimizer, learning rates and their schedule."""

from __future__ import annotations

import ast
import shlex
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator

from trainer.schema.declare import Group, Section, parameter
from trainer.schema.optimizers import OPTIMIZERS, SCHEDULERS, Row

if TYPE_CHECKING:
    Optimizer = str
    Scheduler = str
else:
    Optimizer = Literal[tuple(OPTIMIZERS)]
    Scheduler = Literal[tuple(SCHEDULERS)]
SCHEDULED = tuple(name for name, row in OPTIMIZERS.items() if not row.schedule_free)
WARMING = tuple(name for name in SCHEDULERS if name not in ("constant", "adafactor"))
CYCLING = ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay")


WORDS = {"true": True, "false": False, "none": None}


def parse_arguments(text: Any) -> Any:
    """`"weight_decay=0.1" betas=0.9,0.99` as a dict; values become Python literals where they are.

    Raises ValueError naming the piece that has no `name=value` form.
    """
    if not isinstance(text, str):
        return text
    found = {}
    try:
        pieces = shlex.split(text)
    except ValueError as error:
        raise ValueError(f'"{text}" has a quotation mark without its partner') from error
    for piece in pieces:
        name, equals, value = piece.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f'"{piece}" is not of the form name=value, as in weight_decay=0.1')
        found[name] = _literal(value.strip())
    return found


def _literal(text: str) -> Any:
    """A Python literal (`0.1`, `0.9,0.99`; `true`, `false` and `none` in any case), or else the text itself."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def is_number(value: Any) -> bool:
    """Whether it is one, which Python says of True, too."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def steps_of(number: float, total_steps: int) -> int:
    """A number of steps, which may be given as a share of all."""
    return int(number * total_steps) if isinstance(number, float) and number < 1 else int(number)


Arguments = Annotated[dict[str, Any], BeforeValidator(parse_arguments)]


class Optim(Group):
    scheduler: Scheduler = parameter(
        "lr_scheduler",
        "cosine",
        "LR Scheduler",
        Section.LEARNING,
        """How the learning rate moves from start to end. cosine falls gently to 0 and is a good
        default; constant stays; cosine_with_restarts jumps back up; adafactor lets the Adafactor
        optimizer choose. Schedule-free optimizers have none.""",
        when={"optimizer": SCHEDULED},
    )
    optimizer: Optimizer = parameter(
        "optimizer",
        "AdamW8bit",
        "Optimizer",
        Section.LEARNING,
        """How weights are changed. AdamW8bit: as good as AdamW with a quarter of its memory.
        Adafactor chooses its own rate. Lion: fewer states, wants a rate 3–10 times lower. Prodigy
        and the DAdapt ones search for the rate while they train: set all rates to 1. ScheduleFree
        ones average instead of slowing down. Paged ones give memory back when a GPU runs short.""",
    )
    arguments: Arguments = parameter(
        "optimizer_args",
        "",
        "Optimizer extra arguments",
        Section.LEARNING,
        """name=value pairs for the optimizer, separated by blanks: weight_decay=0.1
        betas=0.9,0.99. An unknown name is refused with the list of those it knows.""",
        kind="text",
        placeholder="weight_decay=0.1 betas=0.9,0.99",
    )
    max_grad_norm: float = parameter(
        "max_grad_norm",
        1.0,
        "Max grad norm",
        Section.LEARNING,
        """Gradients longer than this are shortened to it, so that one odd batch cannot wreck the
        LoRA. 0: off.""",
        ge=0,
    )
    learning_rate: float = parameter(
        "learning_rate",
        1e-4,
        "Learning rate",
        Section.LEARNING,
        """How far each step moves, for the parts whose own rate below is empty; while both hold a value,
        this one has no effect. Too high: broken pictures; too low: nothing happens.""",
        ge=0,
    )
    text_encoder_lr: float | None = parameter(
        "text_encoder_lr",
        5e-5,
        "Text Encoder learning rate",
        Section.LEARNING,
        """Rate of the text encoder, usually half of the U-Net's. 0: the text encoder is not
        trained. Empty: the learning rate above.""",
        ge=0,
        blank="Learning rate",
    )
    unet_lr: float | None = parameter(
        "unet_lr",
        1e-4,
        "Unet learning rate",
        Section.LEARNING,
        """Rate of the U-Net, the part that draws. 0: it is not trained. Empty: the learning rate
        above.""",
        ge=0,
        blank="Learning rate",
    )
    up_ratio: float = parameter(
        "loraplus_lr_ratio",
        0.0,
        "LoRA+ learning rate ratio",
        Section.LEARNING,
        """LoRA+: the up matrices, which start at zero, learn this many times faster than the down matrices. 16 is the
        authors' start; take a lower learning rate with it. 0: off, all learn alike.""",
        ge=0,
        le=128,
    )
    unet_up_ratio: float = parameter(
        "loraplus_unet_lr_ratio",
        0.0,
        "LoRA+ Unet learning rate ratio",
        Section.LEARNING,
        """The LoRA+ ratio of the U-Net alone. 0: the one above.""",
        ge=0,
        le=128,
    )
    text_encoder_up_ratio: float = parameter(
        "loraplus_text_encoder_lr_ratio",
        0.0,
        "LoRA+ Text Encoder learning rate ratio",
        Section.LEARNING,
        """The LoRA+ ratio of the text encoder alone. 0: the one above.""",
        ge=0,
        le=128,
    )
    warmup_percent: float = parameter(
        "lr_warmup",
        10.0,
        "LR warmup (% of total steps)",
        Section.LEARNING,
        """The rate climbs from 0 over this share of all steps, which spares the optimizer a rough
        start. The schedulers constant and adafactor have none.""",
        ge=0,
        le=100,
        when={"lr_scheduler": WARMING, "optimizer": SCHEDULED},
    )
    warmup_steps: int = parameter(
        "lr_warmup_steps",
        0,
        "LR warmup steps (override)",
        Section.LEARNING,
        """The same as a number of steps; above 0 it goes before the percentage.""",
        ge=0,
        when={"lr_scheduler": WARMING, "optimizer": SCHEDULED},
    )
    cycles: float | None = parameter(
        "lr_scheduler_num_cycles",
        None,
        "LR number of cycles",
        Section.LEARNING,
        """How often cosine_with_restarts falls to 0 and starts anew; for cosine_with_min_lr and the
        end of warmup_stable_decay, twice the waves of their cosine. Empty: once.""",
        gt=0,
        blank="1",
        when={"lr_scheduler": CYCLING, "optimizer": SCHEDULED},
    )
    power: float | None = parameter(
        "lr_scheduler_power",
        None,
        "LR power",
        Section.LEARNING,
        """Exponent of polynomial: 1 is a straight line, higher falls faster at first. Empty: 1.""",
        gt=0,
        blank="1",
        when={"lr_scheduler": ("polynomial",), "optimizer": SCHEDULED},
    )
    scheduler_arguments: Arguments = parameter(
        "lr_scheduler_args",
        "",
        "LR scheduler extra arguments",
        Section.LEARNING,
        """name=value pairs for the scheduler, separated by blanks. Three need them:
        piecewise_constant step_rules="1:100,0.1" (factor 1 until step 100, then 0.1),
        cosine_with_min_lr min_lr_rate=0.1 (the share of the rate that is left at the end), and
        warmup_stable_decay num_decay_steps=100.""",
        kind="text",
        placeholder="lr_end=1e-6",
        when={"optimizer": SCHEDULED},
    )
    most_skipped: int = parameter(
        "max_skipped_steps",
        0,
        "Max skipped steps",
        Section.LEARNING,
        """A step whose loss or gradient is not a number ends the training, before it can ruin the LoRA; the log names
        its images. Here: how many such steps in a row are left out instead, each with a warning. They mostly come from
        a learning rate that is too high, and then they do not stop coming; for a single odd image, 5 or so. On a GPU
        it costs a wait in each step. 0: none.""",
        ge=0,
    )
    goes_back: bool = parameter(
        "go_back_on_nan",
        False,
        "Go back when steps fail",
        Section.LEARNING,
        """Where a step that is not a number would end the training: go back to the last saved state instead, with
        half the learning rate and other noise from there, three times at most; the file says so. Needs Save training
        state.""",
    )
    stop_text_encoder_percent: float = parameter(
        "stop_text_encoder_training",
        0.0,
        "Stop text encoder training (% of total steps)",
        Section.RESOLUTION,
        """After this share of all steps the text encoder's part of the LoRA stays as it is; it
        overfits sooner than the U-Net. 0: it is trained to the end.""",
        ge=0,
        le=100,
    )

    @property
    def row(self) -> Row:
        """The optimizer's class and what is special about it."""
        return OPTIMIZERS[self.optimizer]

    def warmup_of(self, total_steps: int) -> int:
        """Steps over which the rate climbs from 0."""
        return self.warmup_steps or int(total_steps * self.warmup_percent / 100)

    @property
    def relative_step(self) -> bool:
        """Whether Adafactor chooses the rate. It does unless told otherwise, and always to warm up."""
        told = self.arguments
        return self.optimizer == "Adafactor" and bool(told.get("relative_step", True) or told.get("warmup_init"))
