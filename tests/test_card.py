"""Trainings on a device that is not the CPU, on any machine: see tests/card.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHOLE = [
    "tests/test_training_families.py::test_a_family_trains_samples_saves_and_goes_on_from_its_state[sdxl]",
    "tests/test_training_families.py::test_cached_text_states_train_and_draw_the_same_and_free_the_text_encoders[sd2_v]",
]
"""Beside those of tests/on_card.py: all that a training does, from its start to a resume."""


def test_nothing_that_a_training_computes_with_is_left_in_the_other_memory():
    program = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "tests.card", "-p", "no:cacheprovider"]
    ended = subprocess.run([*program, "tests/on_card.py", *WHOLE], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
