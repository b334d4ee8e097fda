"""A training's state in a folder, from which it goes on at the next step as if it had never stopped.

    state.json             step, seed, settings, what the pictures were, the scalars of optimizer and
                           scheduler, a digest of the rest
    tensors.safetensors    the network as it is trained, and the optimizer's tensors

No pickle. All randomness follows from the seed and a position, so no random state is kept. The
folder is written under another name and renamed, so it is whole wherever it has its name. The
header needs no torch to be read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data.folders import Picture
from trainer.errors import StateError
from trainer.paths import resolve, shown
from trainer.run import all_runs, sweep
from trainer.schema import PARAMETERS, Config
from trainer.schema.overrides import KEY, SECRET

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LRScheduler

    from trainer.networks import Network

log = logging.getLogger(__name__)
FORMAT, VERSION = "lorawright state", 1
AUTO = "auto"
HEADER, TENSORS = "state.json", "tensors.safetensors"
_NAME = re.compile(r"-state(-\d+)?$")

# The state holds what these stand for, so they cannot change on the way.
_FIXED = ("LoRA_type", "optimizer", "optimizer_args", "full_fp16", "full_bf16")
# What has no influence on the weights, or is told apart (the seed).
_FREE = {
    *SECRET,
    KEY,
    "seed",
    "model_list",
    "cache_latents_to_disk",
    "gradient_checkpointing",
    "max_data_loader_n_workers",
    "num_cpu_threads_per_process",
    "gpu_ids",
    "persistent_data_loader_workers",
    "vae_batch_size",
    *(key for key, p in PARAMETERS.items() if p.group in ("saving", "samples") or p.section.heading == "Logging"),
    "output_dir",
    "logging_dir",
}


# What is noted of a picture, beside its name.
_NOTED = ("another image", "another caption", "other repeats")


@dataclass(frozen=True)
class State:
    """A state folder's header: after which step it was written, with which seed and settings.

    `stopgap`: nobody asked to keep it; it stands for a training that was stopped, until that has gone on.
    `returns`: the steps that training went back to before. `average`: the average loss that was told of last, and of how
    many steps. `written`: see `Retention.rows`.
    """

    folder: Path
    step: int
    seed: int
    batches_per_epoch: int
    settings: Mapping[str, Any]
    digest: str
    packed: Mapping[str, Any]
    pictures: Mapping[str, Any]
    stopgap: bool = False
    returns: Sequence[int] = ()
    average: tuple[float, int] = (0.0, 0)
    written: Sequence[Any] = ()

    def over(self, total_steps: int) -> str:
        """What is said where `auto` finds a training at its end."""
        return (
            f'"{shown(self.folder)}" is at step {self.step} of {total_steps}: nothing is left to train. Raise Epoch (epoch) '
            "or Max train steps (max_train_steps) to go on, or empty it to start anew."
        )

    def leads_into(self, total_steps: int) -> None:
        """Raise StateError when a training of so many steps is over by then."""
        if self.step >= total_steps:
            raise StateError(
                f'"{shown(self.folder)}" is at step {self.step}, and this training has {total_steps} in all.',
                "Raise Epoch (epoch) or Max train steps (max_train_steps) to go on, or leave Resume from saved training "
                "state (resume) empty to start anew.",
            )

    def differences(self, config: Config, batches_per_epoch: int) -> list[str]:
        """What is otherwise than when the state was written, in words.

        Raises StateError for settings with which the state cannot be used.
        """
        then, now = {**settings_of(Config()), **self.settings}, settings_of(config)
        changed = [key for key in now if then[key] != now[key]]
        told = [f"{PARAMETERS[key].label} ({key}) was {then[key]}, now {now[key]}" for key in changed]
        fixed = [text for key, text in zip(changed, told, strict=True) if key in _FIXED]
        if fixed:
            raise StateError(
                f'"{shown(self.folder)}" was trained with other settings: {"; ".join(fixed)}.',
                "Set them back, or start anew with the LoRA file in LoRA network weights (network_weights).",
            )
        if config.training.seed is not None and config.training.seed != self.seed:
            told.append(f"{PARAMETERS['seed'].label} (seed) was {self.seed}, now {config.training.seed}")
        if batches_per_epoch != self.batches_per_epoch:
            told.append(f"an epoch had {self.batches_per_epoch} batches, now {batches_per_epoch}")
        return told

    def other_pictures(self, now: Mapping[str, Any]) -> list[str]:
        """What became of the images and captions since the state was written, in words. `now`: their `fingerprint`."""
        then = self.pictures
        if not then:  # written before pictures were noted
            return []
        both = [name for name in now if name in then]
        kinds = {
            "added": [name for name in now if name not in then],
            "gone": [name for name in then if name not in now],
            **{f"with {what}": [n for n in both if then[n][i] != now[n][i]] for i, what in enumerate(_NOTED)},
        }
        return [f"{len(names)} {what} ({_listed(names)})" for what, names in kinds.items() if names]

    def restore(self, network: Network, optimizer: torch.optim.Optimizer, scheduler: LRScheduler, scaler: Any) -> None:
        """Put everything back. Raises StateError when the folder is damaged, or is of another network."""
        parts = self._parts()
        _fits(self.folder, parts["network"], network)
        network.load_state_dict(parts["network"])
        try:
            optimizer.load_state_dict(parts["optimizer"])
        except (ValueError, KeyError, RuntimeError) as error:
            raise StateError(
                f'"{shown(self.folder)}": the optimizer does not take its state back ({error}).',
                "Train the same parts with the same optimizer and rates that are not 0.",
            ) from error
        _exactly(optimizer, parts["optimizer"])
        _set_scheduler(optimizer, scheduler, parts["scheduler"])
        if scaler is not None and parts["scaler"]:
            scaler.load_state_dict(parts["scaler"])

    def verify(self) -> None:
        """Raise StateError unless the tensors are those that were written."""
        try:
            with (self.folder / TENSORS).open("rb") as file:
                whole = _digest(file) == self.digest
        except OSError as error:
            raise _damaged(self.folder, str(error)) from error
        if not whole:
            raise _damaged(self.folder, f"{TENSORS} is not the one that was written")

    def _parts(self) -> Any:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        self.verify()
        try:
            tensors = load_file(self.folder / TENSORS)
            return {name: _unpacked(part, tensors) for name, part in self.packed.items()}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise _damaged(self.folder, str(error) or type(error).__name__) from error


def find(folder: Path) -> tuple[State, list[str]]:
    """The state that `folder` means, and in words what was passed over for it.

    A state folder means itself. Any other, such as an output folder or a run's, means the newest whole state
    inside; one that is torn is passed over for the one before it. Raises StateError where there is none.
    """
    if not os.path.lexists(folder):
        sweep(folder.parent)  # a trainer may have been killed while it replaced this very one
    states = [] if _NAME.search(folder.name) or is_state(folder) else _inside(folder) or _inside(folder / "output")
    return newest(states, folder) if states else (read(folder), [])


def resumed(config: Config, runs: Path) -> tuple[State, list[str]] | None:
    """The state that the settings mean, as `find` tells it; None where they mean none.

    "auto" is the newest whole state of the output name in the output folder, or, where the settings leave each run
    its own, in those of all `runs`. Raises StateError as `find` does.
    """
    asked = config.saving.resume
    if asked != AUTO:
        return find(resolve(asked)) if asked else None
    own = re.compile(re.escape(config.saving.name) + r"(-\d{6}|-step\d{8})?" + _NAME.pattern)
    outputs = [resolve(config.folders.output)] if config.folders.output else [run.output for run in all_runs(runs)]
    states = [path for folder in outputs for path in _inside(folder) if own.fullmatch(path.name)]
    return newest(sorted(states, key=_written, reverse=True), outputs[0]) if states else None


def newest(states: Sequence[Path], folder: Path) -> tuple[State, list[str]]:
    """The first of `states`, which lie in `folder`, that is whole, and why those before it are not.

    Raises StateError where none is.
    """
    passed = []
    for path in states:
        try:
            found = read(path)
            found.verify()
            return found, passed
        except StateError as error:
            passed.append(error.message)
    raise StateError(
        f'None of the {len(states)} training states in "{shown(folder)}" can be used. {" ".join(passed)}',
        "Start anew with the newest LoRA file in LoRA network weights (network_weights).",
    )


def _inside(folder: Path) -> list[Path]:
    """The folders in a folder that are called as states are, those that were written last first."""
    try:
        inner = [path for path in folder.iterdir() if _NAME.search(path.name) and path.is_dir()]
        return sorted(inner, key=_written, reverse=True)
    except (OSError, ValueError):  # no such folder; a path with NUL
        return []


def _written(folder: Path) -> int:
    return max(path.stat().st_mtime_ns for path in (folder, *folder.iterdir()))


def read(folder: Path) -> State:
    """A state folder's header. Raises StateError when it is none, or not whole."""
    if not os.path.isfile(folder / HEADER):  # noqa: PTH113  answers False where pathlib raises
        raise StateError(
            f'"{shown(folder)}" is no training state: {_why_not(folder)}.',
            "Choose a folder NAME-state, or empty it to start anew.",
        )
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        if header["format"] != FORMAT or header["version"] != VERSION:
            raise StateError(
                f'"{shown(folder)}" is a state of another program or version '
                f"({header['format']} {header['version']}; this is {FORMAT} {VERSION}).",
                "Resume it with the program that wrote it.",
            )
        size = (folder / TENSORS).stat().st_size
        if size != header["bytes"]:
            raise _damaged(folder, f"{TENSORS} has {size} of {header['bytes']} bytes")
        return State(
            folder,
            int(header["step"]),
            int(header["seed"]),
            int(header["batches_per_epoch"]),
            dict(header["settings"]),
            str(header["digest"]),
            dict(header["parts"]),
            dict(header.get("pictures", {})),
            bool(header.get("stopgap", False)),
            tuple(header.get("returns", ())),
            (float(header.get("average_loss", 0.0)), int(header.get("losses", 0))),
            tuple(header.get("written", ())),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, str(error) or type(error).__name__) from error


def is_state(folder: Path) -> bool:
    """Whether a folder holds a state of ours and nothing else."""
    try:
        return {path.name for path in folder.iterdir()} <= {HEADER, TENSORS} and read(folder).step >= 0
    except (OSError, ValueError, StateError):  # no folder; a path with NUL
        return False


def write(
    folder: Path,
    step: int,
    seed: int,
    batches_per_epoch: int,
    config: Config,
    parts: Mapping[str, Any],
    pictures: Mapping[str, Any] | None = None,
    *,
    stopgap: bool = False,
    returns: Sequence[int] = (),
    average: tuple[float, int] = (0.0, 0),
    written: Sequence[Any] = (),
) -> Path:
    """Write a state folder; whole or not at all. Returns where it is. `pictures`: their `fingerprint`.

    A state that has the name already is replaced. A folder that is none is left alone, and the
    state gets a number behind its name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = folder
    attempt = 2
    while target.exists() and not is_state(target):
        target = folder.with_name(f"{folder.name}-{attempt}")
        attempt += 1
    fresh, old = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    remove(fresh)
    remove(old)
    fresh.mkdir(parents=True)
    try:
        tensors: dict[str, torch.Tensor] = {}
        packed = {name: _packed(part, tensors) for name, part in parts.items()}
        try:
            save_file(tensors, fresh / TENSORS)
        except SafetensorError as error:
            if f"os error {errno.ENOSPC}" not in str(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(fresh / TENSORS)) from error
        with (fresh / TENSORS).open("rb") as file:
            digest = _digest(file)
            os.fsync(file.fileno())
        header = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "seed": seed,
            "batches_per_epoch": batches_per_epoch,
            "settings": settings_of(config),
            "bytes": (fresh / TENSORS).stat().st_size,
            "digest": digest,
            "parts": packed,
            "pictures": dict(pictures or {}),
            "stopgap": stopgap,
            "returns": list(returns),
            "average_loss": average[0],
            "losses": average[1],
            "written": list(written),
        }
        with (fresh / HEADER).open("w", encoding="utf-8") as text:
            json.dump(header, text)
            text.flush()
            os.fsync(text.fileno())
        if target.exists():
            target.rename(old)
            try:
                fresh.rename(target)
            except OSError:
                old.rename(target)
                raise
            remove(old)
        else:
            fresh.rename(target)
    except BaseException:
        remove(fresh)
        raise
    return target


def supersede(past: State | None) -> None:
    """Delete a state that stood for a stopped training, now that this has gone on; any other stays."""
    if past is None or not past.stopgap or not is_state(past.folder) or read(past.folder).digest != past.digest:
        return
    remove(past.folder)
    log.info("deleted %s, which training has gone on from", past.folder)


def remove(folder: Path) -> None:
    """Delete a state folder: the header first, so that what is left is no state; then nothing but our files."""
    for name in (HEADER, TENSORS):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir():
        folder.rmdir()


def parts_of(network: Network, optimizer: torch.optim.Optimizer, scheduler: LRScheduler, scaler: Any) -> dict[str, Any]:
    """All that a training's next step depends on beside settings, seed and step."""
    return {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        # The schedule itself follows from the settings.
        "scheduler": {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"},
        "scaler": scaler.state_dict() if scaler is not None else {},
    }


def fingerprint(pictures: Iterable[Picture]) -> dict[str, list[Any]]:
    """By folder and name what tells one state of a picture from another, in the order of _NOTED."""
    return {
        f"{'regularisation: ' if p.regularisation else ''}{p.folder}/{p.path.name}": [
            [*p.size, p.path.stat().st_size],
            hashlib.blake2b(repr((p.caption, p.class_tokens)).encode(), digest_size=8).hexdigest(),
            p.repeats,
        ]
        for p in pictures
    }


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(shown(name) for name in names[:most]) + (", …" if len(names) > most else "")


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that the weights depend on, by key, as JSON."""
    values = {k: getattr(getattr(config, p.group), p.name) for k, p in PARAMETERS.items() if k not in _FREE}
    return json.loads(json.dumps(values, default=str))  # type: ignore[no-any-return]


def _fits(folder: Path, saved: Mapping[str, torch.Tensor], network: Network) -> None:
    own = network.state_dict()
    for name in [*own, *saved]:
        wanted, found = (f"{list(t[name].shape)}" if name in t else "nothing" for t in (own, saved))
        if wanted != found:
            raise StateError(
                f'"{shown(folder)}" is of another network: for {name.removeprefix("layers.")} it holds {found}, '
                f"this one has {wanted}.",
                "Set rank, blocks and trained parts as they were.",
            )
        if name.endswith(".alpha") and float(own[name]) != float(saved[name]):
            raise StateError(
                f'"{shown(folder)}" is of another network: {name.removeprefix("layers.")} is {float(saved[name]):g} '
                f"there and {float(own[name]):g} here.",
                "Set Network Alpha (network_alpha) and the blocks' alphas as they were.",
            )


def _exactly(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Give tensors back the dtype that torch's own loading rounds to that of the weights."""
    for group, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, number in zip(group["params"], theirs["params"], strict=True):
            state = optimizer.state.get(parameter, {})
            for key, value in saved["state"].get(number, {}).items():
                present = state.get(key)
                if hasattr(value, "dtype") and hasattr(present, "dtype") and present.dtype != value.dtype:
                    state[key] = value.to(present.device)


def _set_scheduler(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, saved: Mapping[str, Any]) -> None:
    """Put the schedule at the state's step. Its rates are those of the present settings."""
    from torch.optim.lr_scheduler import LambdaLR

    bases = scheduler.base_lrs
    vars(scheduler).update(saved)
    if type(scheduler) is not LambdaLR:
        return
    scheduler.base_lrs = bases
    step = scheduler.last_epoch
    rates = [base * multiple(step) for base, multiple in zip(bases, scheduler.lr_lambdas, strict=True)]
    for group, base, rate in zip(optimizer.param_groups, bases, rates, strict=True):
        group["initial_lr"], group["lr"] = base, rate
    scheduler._last_lr = rates


def _packed(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A tree of dicts, lists and scalars as JSON; its tensors go into `tensors` and leave their name."""
    import torch

    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, _packed(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_packed(inner, tensors) for inner in value]}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(value)}
    assert value is None or isinstance(value, bool | int | str), f"{type(value)} in an optimizer's state"
    return value


def _unpacked(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "float":
        return float(inner)
    if kind == "dict":
        return {key: _unpacked(item, tensors) for key, item in inner}
    items: Iterator[Any] = (_unpacked(item, tensors) for item in inner)
    return tuple(items) if kind == "tuple" else list(items)


def _digest(file: Any) -> str:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _damaged(folder: Path, why: str) -> StateError:
    return StateError(f'"{shown(folder)}" is a damaged training state: {why}.', "Resume from an earlier one.")


def _why_not(folder: Path) -> str:
    if not os.path.isdir(folder):  # noqa: PTH112
        return "there is no such folder"
    if any((folder / name).exists() for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl")):
        return "kohya's scripts wrote it, with pickle, which can run any program when it is read"
    return f"it holds no {HEADER}"
