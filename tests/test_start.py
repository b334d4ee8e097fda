"""What stands in a run's log."""

import logging

from trainer import start
from trainer.run import Run


def test_a_package_that_is_not_needed_is_not_asked_for_in_the_log_and_other_warnings_stay(tmp_path):
    run = Run(tmp_path)
    with start._logging_to(run):
        theirs = logging.getLogger(start.BITSANDBYTES)
        theirs.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
        theirs.warning("Something else.")
    assert "Something else." in run.log.read_text()
    assert "kernels" not in run.log.read_text()
