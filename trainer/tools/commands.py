"""Every tool, declared once: what it does, its options, an example.

The command line, the checks and the forms of the Tools tab follow from this. Needs no torch.
"""

from __future__ import annotations

import argparse
import importlib
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from trainer.errors import ConfigError, LorawrightError, Problem
from trainer.events import Event, EventLog, Failed, Phase
from trainer.paths import absent, resolve
from trainer.run import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from trainer.schema.declare import Group, Parameter, describe, parameter
from trainer.tools import Report

LORA_FILES, CHECKPOINTS, IMAGES = "LoRA files", "Checkpoints", "Images"
SAME = "same"
MOST_STRENGTH = 10
MODEL_KIND = "model_kind"
"""In an option's `when`: what the folder of a captioning model holds, of these kinds."""
BLIP, FLORENCE, TAGGER = "BLIP", "Florence-2", "WD14 tagger"
Precision = Literal["same", "fp16", "bf16", "float"]

option = partial(parameter, section=None)  # a tool's form has no sections
lora = partial(option, "lora", "", "LoRA", kind="file")
output = partial(option, "output", "", "Output", kind="file")
precision = partial(
    option,
    "precision",
    SAME,
    "Precision",
    help="The number format of the file that is written. fp16 and bf16 take half of float's space; "
    "fp16 is the usual one for files that others load. same: as the input has it, of several the first.",
)


def paths_of(lines: str) -> list[Path]:
    """The paths of an option that has one a line."""
    return [resolve(line) for line in lines.splitlines() if line.strip()]


class Weighted(Group):
    """Options with several LoRAs, each with a number."""

    loras: str = option("loras", "", "LoRAs", help="LoRA files of any type.", kind="lines")
    strengths: str = option(
        "strengths",
        "1",
        "Strengths",
        help="How strongly each LoRA counts: one number for all, or one for each, with commas between. "
        "1 is as trained, 0.5 half of it, -1 takes it away.",
    )

    def pairs(self) -> list[tuple[Path, float]]:
        """Each LoRA with its strength. Raises ConfigError when the numbers do not fit."""
        paths = paths_of(self.loras)
        words = self.strengths.replace(",", " ").split() or ["1"]
        try:
            numbers = [float(word) for word in words]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, len(paths)) or not all(abs(number) < 1e6 for number in numbers):
            message = f'"{self.strengths}" is not allowed; it must be one number, or {len(paths)} with commas between'
            raise ConfigError([Problem("strengths", "Strengths", message)])
        return list(zip(paths, numbers * len(paths) if len(numbers) == 1 else numbers, strict=True))


class Merge(Weighted):
    model: str = option(
        "model", "", "Checkpoint", help="The base model: one .safetensors file, or a diffusers folder.", kind="model"
    )
    output: str = output(help="The checkpoint to write: a file for a file, a folder for a diffusers folder.")
    precision: Precision = precision()


class MergeLoras(Weighted):
    output: str = output(help="The LoRA file to write.")
    rank: int | None = option(
        "rank",
        None,
        "Rank",
        help="The rank of the merged LoRA. Empty keeps all of every LoRA exactly: their ranks add up. "
        "A smaller rank makes a smaller file that keeps the strongest parts.",
        blank="exact, the ranks add up",
        ge=1,
    )
    conv_rank: int | None = option(
        "conv_rank", None, "Rank of 3×3 convolutions", help="Of 3×3 convolutions, where any LoRA has them.",
        blank="as Rank", ge=1,
    )  # fmt: skip
    precision: Precision = precision()


class Resize(Group):
    lora: str = lora(help="The LoRA file to make smaller.")
    output: str = output(help="The LoRA file to write.")
    rank: int = option(
        "rank", 4, "Rank", ge=1,
        help="The new rank; with a method below it is the largest that a layer may have.",
    )  # fmt: skip
    conv_rank: int | None = option(
        "conv_rank", None, "Rank of 3×3 convolutions", help="The same for 3×3 convolutions.", blank="as Rank", ge=1
    )
    method: Literal["fixed", "sv_ratio", "sv_fro", "sv_cumulative"] = option(
        "method",
        "fixed",
        "Method",
        help="fixed: every layer gets the rank above. The others choose it layer by layer from its singular values: "
        "sv_fro keeps a share of the layer's norm (0.9 is a good start), sv_cumulative a share of their sum, "
        "sv_ratio those above the largest divided by a number (2 is strict, 20 mild).",
    )
    share: float | None = option(
        "share",
        None,
        "Share or ratio",
        help="What the method keeps: 0 to 1 for sv_fro and sv_cumulative, 2 or more for sv_ratio.",
        when={"method": ("sv_ratio", "sv_fro", "sv_cumulative")},
        blank="0.9, or 20 for sv_ratio",
        gt=0,
    )
    precision: Precision = precision()

    @property
    def kept(self) -> float:
        """The share or ratio that the method keeps. Raises ConfigError where it cannot be one."""
        value = self.share if self.share is not None else (20.0 if self.method == "sv_ratio" else 0.9)
        if (value < 1) if self.method == "sv_ratio" else (value > 1):
            allowed = "1 or more" if self.method == "sv_ratio" else "a number above 0 up to 1"
            message = f'"{value:g}" is not allowed; with {self.method} it must be {allowed}'
            raise ConfigError([Problem("share", "Share or ratio", message)])
        return value


class Extract(Group):
    original: str = option(
        "original", "", "Original", help="The checkpoint that the other was made from.", kind="model"
    )
    tuned: str = option(
        "tuned", "", "Tuned", help="The changed checkpoint. The LoRA is what it has over the original.", kind="model"
    )
    output: str = output(help="The LoRA file to write.")
    rank: int = option(
        "rank", 4, "Rank", help="More keeps more of the difference and makes a larger file: 32 to 128 are usual.", ge=1
    )
    conv_rank: int | None = option(
        "conv_rank", None, "Rank of 3×3 convolutions",
        help="Extract the U-Net's resnets and samplers too, 3×3 convolutions with this rank.",
        blank="attention only", ge=1,
    )  # fmt: skip
    text_encoder: bool = option(
        "text_encoder", True, "Text encoder", help="Extract it too, if it differs by more than the number beside."
    )
    min_diff: float = option(
        "min_diff",
        0.01,
        "Least difference",
        help="If no number of the text encoder differs by more than this, it counts as unchanged and is left out. "
        "Lower it for a model whose text encoder was trained gently.",
        when={"text_encoder": True},
        ge=0,
    )
    precision: Precision = precision()


class Read(Group):
    lora: str = lora(help="A LoRA file of any type and naming.")


class Convert(Group):
    lora: str = lora(help="A LoRA file of any naming.")
    output: str = output(help="The LoRA file to write.")
    names: Literal["kohya", "diffusers"] = option(
        "names",
        "kohya",
        "Names",
        help="kohya: for web UIs, ComfyUI, sd-scripts and this program. diffusers: for programs built on diffusers "
        "that do not read kohya's names.",
    )
    alpha: Literal["required", "rank"] = option(
        "alpha",
        "required",
        "Missing alphas",
        help="A file of kohya's naming without alphas does not say how strong it is meant to be and is refused. "
        "rank: take the rank for them, as most programs do.",
    )


class Grid(Group):
    loras: str = option(
        "loras", "", "LoRAs", kind="lines",
        help="The files to choose from, one row each: those that a run saved, or any others of one base model.",
    )  # fmt: skip
    at: str = option(
        "at",
        "0.5, 0.75, 1",
        "Strengths",
        help="The strengths to draw each file at, one column each, with commas between. 1 is as trained, 0 is the base "
        "model alone.",
    )
    prompts: str = option(
        "prompts",
        "",
        "Prompts",
        help="One prompt a line, with the flags of sample prompts at its end (--n, --w, --h, --d, --l, --s). Every file "
        "and strength gets the same seeds.",
        kind="lines",
        blank="those of the settings",
    )
    output: str = option(
        "output", "", "Output", kind="file",
        help="The folder to draw into. Drawn again, it gets only the pictures that it lacks; those of another "
        "grid in it go.",
    )  # fmt: skip
    settings: str = option(
        "settings",
        "",
        "Settings",
        help="A run's folder or a preset file: base model, precision, size, sampler and prompts are taken from it.",
        kind="file",
        blank="what the first LoRA says of its training",
    )
    model: str = option(
        "model", "", "Checkpoint", help="The base model to draw with.", kind="model", blank="that of the settings"
    )
    seed: int | None = option(
        "seed", None, "Seed", help="For prompts without a seed of their own.", blank="that of the training", ge=0
    )

    @property
    def paths(self) -> list[Path]:
        return paths_of(self.loras)

    @property
    def strengths(self) -> list[float]:
        """Each once, in order. Raises ConfigError where one is no number."""
        try:
            found = list(dict.fromkeys(float(word) for word in self.at.replace(",", " ").split()))
        except ValueError:
            found = []
        if not found or not all(abs(number) <= MOST_STRENGTH for number in found):
            message = f'"{self.at}" is not allowed; it must be numbers from -{MOST_STRENGTH} to {MOST_STRENGTH} with commas between'
            raise ConfigError([Problem("at", "Strengths", message)])
        return found


class Caption(Group):
    """The page shows what the kind of model has, which it finds out from the folder (captioning.kind_of)."""

    model: str = option(
        "model", "", "Captioning model", kind="folder",
        help="A folder with a BLIP or Florence-2 model in transformers' layout, or with a WD14 tagger "
        "(model.onnx and selected_tags.csv). Nothing is downloaded, and no code out of the folder is run.",
    )  # fmt: skip
    folder: str = option(
        "folder", "", "Image folder", kind="folder",
        help="Images, or folders like 10_cat that hold them, as for a training.",
    )  # fmt: skip
    existing: Literal["skip", "append", "replace"] = option(
        "existing",
        "skip",
        "Captions that exist",
        help="skip: only images without a caption file get one. append: the new one is put behind the old. "
        "replace: in place of the old. What was there is kept, and the Dataset tab takes it back.",
    )
    extension: Literal[".caption", ".txt", ".cap"] = option(
        "extension", ".caption", "Ending", help="Of the caption files: as Caption extension in the form."
    )
    prefix: str = option(
        "prefix", "", "Text before", help='Put before every new caption, for instance a trigger word: "zwx,".'
    )
    detail: Literal["short", "detailed", "long"] = option(
        "detail", "detailed", "Detail", when={MODEL_KIND: (FLORENCE,)},
        help="How much Florence-2 tells. BLIP tells one short sentence.",
    )  # fmt: skip
    max_tokens: int = option(
        "max_tokens", 75, "Max tokens", ge=1, le=1024, when={MODEL_KIND: (BLIP, FLORENCE)},
        help="The longest that a sentence may become. 75 is what a training reads without more chunks.",
    )  # fmt: skip
    threshold: float = option(
        "threshold", 0.35, "Threshold", ge=0, le=1, when={MODEL_KIND: (TAGGER,)},
        help="A tagger's tags count from this probability on. Lower gives more tags, and more wrong ones.",
    )  # fmt: skip
    character_threshold: float = option(
        "character_threshold", 0.85, "Threshold for characters", ge=0, le=1, when={MODEL_KIND: (TAGGER,)},
        help="The same for the names of characters, which are guessed wrong more often.",
    )  # fmt: skip
    batch_size: int = option(
        "batch_size", 4, "Batch size", ge=1, le=256, help="Images at once: more is quicker on a GPU, and takes memory."
    )
    backups: str = option(
        "backups", "runs/captions", "Backups", help="The folder that keeps what the captions were.", kind="folder"
    )


@dataclass(frozen=True)
class Tool:
    """`inputs`: the options that must be given; on the command line they stand without a name.

    `group`: what it works on, under which the page lists it. `stopped`: what is told when it is stopped.
    """

    name: str
    label: str
    group: str
    summary: str
    example: str
    options: type[Group]
    inputs: tuple[str, ...]
    stopped: str = "Stopped; nothing was written."

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The options by key: the inputs, the output, the rest."""
        found = [describe(self.name, name, field) for name, field in self.options.model_fields.items()]
        order = [*self.inputs, "strengths", "output"]
        found.sort(key=lambda p: order.index(p.key) if p.key in order else len(order))
        return {p.key: p for p in found}

    def read(self, values: Mapping[str, Any]) -> Group:
        """The typed options. Raises ConfigError naming every control that is wrong."""
        try:
            options = self.options.model_validate(dict(values))
        except ValidationError as error:
            wrong = {str(e["loc"][0]) for e in error.errors()}
            raise ConfigError([self._refusal(key, values.get(key, "")) for key in wrong]) from error
        problems = [
            Problem(key, p.label, "is empty, and the tool needs it")
            for key, p in self.parameters.items()
            if key in (*self.inputs, "output") and not str(getattr(options, p.name)).strip()
        ]
        if not problems:
            read = [key for key, p in self.parameters.items() if key in self.inputs or p.kind in ("file", "model")]
            problems = [p for key in read if key != "output" for p in self._absent(key, getattr(options, key))]
        if problems:
            raise ConfigError(problems)
        return options

    def _refusal(self, key: str, value: Any) -> Problem:
        p = self.parameters[key]
        return Problem(key, p.label, f'"{value}" is not allowed; it must be {p.allowed}')

    def _absent(self, key: str, text: str) -> list[Problem]:
        lines = [line for line in text.splitlines() if line.strip()]
        noun = {"model": "file or folder", "folder": "folder"}.get(self.parameters[key].kind, "file")
        label = self.parameters[key].label
        return [Problem(key, label, absent(line, noun)) for line in lines if not resolve(line).exists()]

    def words(self, values: Mapping[str, Any]) -> list[str]:
        """The command line that means these values, behind `python -m trainer`."""
        named = []
        for key, value in values.items():
            if isinstance(value, bool):
                named.append(f"--{key}" if value else f"--no-{key}")
            elif key not in self.inputs and value != "":
                named.append(f"--{key}={value}")
        lines = [line for key in self.inputs for line in str(values.get(key, "")).splitlines() if line.strip()]
        return [self.name, *named, "--", *lines]

    def run(self, options: Group, tell: Callable[[str, int, int], None]) -> Report:
        module = importlib.import_module(f"trainer.tools.{self.name.replace('-', '_')}")
        return module.run(options, tell)  # type: ignore[no-any-return]


TOOLS: Mapping[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool(
            "inspect",
            "Inspect",
            LORA_FILES,
            "Tell what a LoRA file was trained on and with, and what of it would be needed to train again.",
            "inspect style.safetensors",
            Read,
            ("lora",),
        ),
        Tool(
            "verify",
            "Verify",
            LORA_FILES,
            "Prove a LoRA file: its numbers, its names against those that other programs know, its metadata.",
            "verify style.safetensors",
            Read,
            ("lora",),
        ),
        Tool(
            "merge",
            "Merge into a checkpoint",
            CHECKPOINTS,
            "Add LoRAs of any type to a base model and write it as a new checkpoint that needs no LoRA.",
            "merge base.safetensors style.safetensors --strengths 0.8 --output styled.safetensors",
            Merge,
            ("model", "loras"),
        ),
        Tool(
            "merge-loras",
            "Merge LoRAs",
            LORA_FILES,
            "Make one LoRA of several: exactly, their ranks added up, or the best of a smaller rank (SVD).",
            "merge-loras style.safetensors face.safetensors --strengths 1 0.5 --rank 16 --output both.safetensors",
            MergeLoras,
            ("loras",),
        ),
        Tool(
            "resize",
            "Resize",
            LORA_FILES,
            "Make a LoRA smaller: to a rank, or layer by layer by what its singular values are worth.",
            "resize style.safetensors --rank 32 --method sv_fro --share 0.9 --output smaller.safetensors",
            Resize,
            ("lora",),
        ),
        Tool(
            "extract",
            "Extract",
            CHECKPOINTS,
            "Make a LoRA of the difference between two checkpoints of one family.",
            "extract base.safetensors tuned.safetensors --rank 32 --output difference.safetensors",
            Extract,
            ("original", "tuned"),
        ),
        Tool(
            "convert",
            "Convert",
            LORA_FILES,
            "Write a LoRA under another program's tensor names; its numbers stay the same.",
            "convert style.safetensors --names diffusers --output style-diffusers.safetensors",
            Convert,
            ("lora",),
        ),
        Tool(
            "grid",
            "Choose a checkpoint",
            LORA_FILES,
            "Draw the same prompts with every file at every strength, from the same seeds, to choose by.",
            "grid style-000002.safetensors style.safetensors --settings runs/20260102-030405-style --output style-grid",
            Grid,
            ("loras",),
            "Stopped; the pictures drawn so far are kept.",
        ),
        Tool(
            "caption",
            "Caption images",
            IMAGES,
            "Write captions for images with a model that you have on disk: BLIP, Florence-2, or a WD14 tagger.",
            "caption models/blip images --extension .txt --prefix zwx,",
            Caption,
            ("model", "folder"),
            stopped="Stopped; the captions that were written stay, and can be taken back in the Dataset tab.",
        ),
    )
}


def add_to(commands: Any) -> None:
    """Declare the tools' sub-commands."""
    for tool in TOOLS.values():
        command = commands.add_parser(
            tool.name,
            help=tool.summary,
            description=tool.summary,
            epilog=f"Example: python -m trainer {tool.example}",
            allow_abbrev=False,
        )
        # "-1,0.5" is a value, too: argparse knows a number alone.
        command._negative_number_matcher = re.compile(r"-[\d.][-\d., ]*$")
        for p in tool.parameters.values():
            words = f"{p.help} Allowed: {p.allowed}." if p.kind in ("integer", "number") else p.help
            words = words.replace("%", "%%")
            if p.key in tool.inputs:
                command.add_argument(p.key, metavar=p.key.upper(), nargs="+" if p.kind == "lines" else None, help=words)
            elif p.kind == "switch":
                command.add_argument(f"--{p.key}", action=argparse.BooleanOptionalAction, default=p.default, help=words)
            elif p.key == "strengths":
                command.add_argument("--strengths", nargs="+", default=[str(p.default)], help=words)
            else:
                command.add_argument(
                    f"--{p.key}",
                    required=p.key == "output",
                    default="" if p.default is None else p.default,
                    metavar="|".join(p.choices) or p.key.upper(),
                    help=f"{words} Default: {p.default}." if p.default not in (None, "") else words,
                )
        command.add_argument("--events", type=Path, help="append what happens to this file, as JSON lines")


@dataclass(frozen=True)
class Reported(Event):
    """A tool is done; the fields are those of its report."""

    type: ClassVar[str] = "report"
    report: dict[str, Any]


def main(given: argparse.Namespace) -> int:
    """Run the tool of a parsed command line. Returns the exit code: 0 done, 1 failed, 2 bad options, 3 stopped."""
    tool = TOOLS[given.command]
    values = {
        key: "\n".join(value) if key == "loras" else ",".join(value) if key == "strengths" else value
        for key in tool.parameters
        for value in [getattr(given, key)]
    }
    try:
        events = EventLog(given.events) if given.events else None
    except OSError as error:
        print(f'"{given.events}" (--events) cannot be written: {error.strerror}.', file=sys.stderr)
        return EXIT_CONFIG
    teller = _Teller(events)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        report = tool.run(tool.read(values), teller)
    except KeyboardInterrupt:
        return _fail(events, Failed("stopped", tool.stopped), EXIT_STOPPED)
    except ConfigError as error:
        return _fail(events, Failed("config", "\n".join(str(p) for p in error.problems)), EXIT_CONFIG)
    except LorawrightError as error:
        return _fail(events, Failed(error.kind, error.message, error.hint), EXIT_FAILED)
    except OSError as error:
        message = f'"{error.filename}": {error.strerror}.' if error.filename else str(error)
        return _fail(events, Failed("file", message, "Check the path, its permissions and the room."), EXIT_FAILED)
    finally:
        teller.end()
        signal.signal(signal.SIGTERM, before)
    if events:
        events.emit(Reported(asdict(report)))
    print(as_text(report))
    return EXIT_DONE


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(events: EventLog | None, failed: Failed, code: int) -> int:
    if events:
        events.emit(failed)
    print(f"{failed.message} {failed.hint}".strip(), file=sys.stderr)
    return code


class _Teller:
    """Tells how far a tool is: on the terminal's one line and as events, ten times a second at most."""

    def __init__(self, events: EventLog | None) -> None:
        self.events = events
        self.phase, self.told = "", 0.0
        self.terminal = sys.stderr.isatty()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase == self.phase and now - self.told < 0.1 and done < total:
            return
        self.phase, self.told = phase, now
        if self.events:
            self.events.emit(Phase(phase, done, total))
        if self.terminal:
            print(f"\r\033[K{phase} … {done}/{total}" if total else f"\r\033[K{phase} …", end="", file=sys.stderr)

    def end(self) -> None:
        if self.terminal and self.phase:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def as_text(report: Report) -> str:
    """A report for the terminal; its table in columns."""
    table = [tuple(report.columns), *map(tuple, report.rows)] if report.rows else []
    widths = [max(len(str(row[i])) for row in table) for i in range(len(report.columns))] if table else []
    rows = [
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    ]
    return "\n".join([*rows, *([""] if rows else []), *report.lines, *(f"Note: {w}" for w in report.warnings)])


def problems_of(tool: str, values: Mapping[str, Any]) -> Sequence[Problem]:
    """What is wrong with the options of a tool, before anything is run."""
    try:
        TOOLS[tool].read(values)
    except ConfigError as error:
        return error.problems
    return ()
