"""The command line: python -m trainer {train,check,parameters,merge,resize,…} …"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import logging
import os
import sys
import threading
from pathlib import Path
from typing import NoReturn

from trainer import kohya
from trainer.errors import ConfigError
from trainer.run import EXIT_CONFIG, EXIT_DONE
from trainer.tools import commands as tools

FIRST_STEPS = Path(__file__).parents[1] / "presets" / "first-steps.json"

# Large tensors in large pages, of which Linux hands out 512 times fewer. PyTorch asks for this at its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0 done, 1 failed, 2 bad settings, 3 stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Train LoRAs for Stable Diffusion, and work on finished ones. Any setting of the preset can be "
        "given after it as --KEY VALUE, for instance --learning_rate 5e-5.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train; exit code 0 only when training finished")
    train.add_argument("preset", type=Path)
    train.add_argument("--run", type=Path, help="the run's folder (default: a new one in runs/)")
    check = commands.add_parser("check", help="find everything that would stop this preset")
    check.add_argument("preset", type=Path)
    check.add_argument("--json", action="store_true", help="answer in JSON")
    check.add_argument(
        "--trial",
        action="store_true",
        help="then take three steps and draw a picture for real: memory, time, and what would lower them",
    )
    draws = commands.add_parser("draws", help="show what the training's loader hands out: images, captions, tokens")
    draws.add_argument("preset", type=Path)
    draws.add_argument("--batch", type=int, default=0, help="where to begin; 0 is the first step's (default: 0)")
    draws.add_argument("--json", action="store_true", help="answer in JSON, with the pictures")
    doctor = commands.add_parser("doctor", help="try out whether this machine and installation can train")
    doctor.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of all runs (default: runs)")
    doctor.add_argument("--events", type=Path, help="append what is found to this file, as JSON lines")
    bench = commands.add_parser("bench", help="measure how fast a preset trains here, and where the time goes")
    bench.add_argument("preset", type=Path, nargs="?", default=FIRST_STEPS, help="default: first-steps")
    bench.add_argument("--steps", type=int, default=20, help="how many steps are measured (default: 20)")
    bench.add_argument("--json", action="store_true", help="answer in JSON")
    commands.add_parser("parameters", help="print the table of all parameters")
    tools.add_to(commands)
    known, rest = parser.parse_known_args(arguments)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_matters)

    if rest and known.command in (*tools.TOOLS, "parameters", "doctor"):
        parser.error(f"unknown: {' '.join(rest)}")
    if known.command in tools.TOOLS:
        return tools.main(known)
    if known.command == "parameters":
        from trainer.schema.table import markdown

        print(markdown(), end="")
        return EXIT_DONE
    if known.command == "doctor":
        from trainer.doctor import report as examined

        return examined(known.runs.resolve(), known.events)
    try:
        preset = kohya.load(known.preset)
        preset = kohya.overridden(preset, rest)
    except ConfigError as error:
        return _refuse(error, getattr(known, "json", False))
    if known.command == "check":
        from trainer.check import report

        return report(preset, as_json=known.json, trial=known.trial)
    if known.command == "draws":
        from trainer.draws import report as drawn

        return drawn(preset, known.batch, as_json=known.json)
    if known.command == "bench":
        from trainer.bench import report as measured

        return measured(preset, known.preset, known.steps, as_json=known.json)
    from trainer.start import train as start

    return start(preset, known.run)


def _matters(record: logging.LogRecord) -> bool:
    # At its import bitsandbytes asks for a package that would speed up 4-bit weights on some CPUs; all works without.
    return "kernels-community" not in record.getMessage()


def _refuse(error: ConfigError, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"problems": [p.__dict__ for p in error.problems], "notes": [], "summary": {}}))
    else:
        print(error, file=sys.stderr)
    return EXIT_CONFIG


def _leave(code: int) -> NoReturn:
    """End the process as Python does, but without taking a model apart object by object, for which it takes a second."""
    threading._shutdown()  # type: ignore[attr-defined]  waits for threads
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):  # what cannot be written is told by the longer way
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # a program without a console has none
                stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    try:
        code = main()
    except BrokenPipeError:  # whoever reads what is printed has read enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = EXIT_DONE
    _leave(code)
