"""What stands in a run's log, and how its process ends."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.__main__ import main


def test_a_package_that_is_not_needed_is_not_asked_for_in_the_log_and_other_warnings_stay(caplog):
    main(["parameters"])
    theirs = logging.getLogger("bitsandbytes.backends.cpu.ops")
    theirs.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    theirs.warning("Something else.")
    assert caplog.messages == ["Something else."]


LEAVING = (
    "import atexit; from trainer.__main__ import _leave; atexit.register(print, 'let go'); print('said'); _leave(3)"
)


def test_a_process_that_leaves_has_said_all_and_let_go_of_what_it_held():
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said\nlet go\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
def test_a_process_whose_last_words_find_no_room_fails():
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", LEAVING], stdout=full, stderr=subprocess.PIPE, env=buffered, timeout=60
        )
    assert done.returncode == 120 and b"No space left on device" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="a shell's >&- is meant")
def test_a_process_without_standard_output_ends_as_one_with_it():
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" >&-', sys.executable, LEAVING.replace("print('said'); ", "")],
        stderr=subprocess.PIPE,
        timeout=60,
    )
    assert done.returncode == 3 and done.stderr == b""
