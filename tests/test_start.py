"""What stands in a run's log."""

import logging

from trainer.__main__ import main


def test_a_package_that_is_not_needed_is_not_asked_for_in_the_log_and_other_warnings_stay(caplog):
    main(["parameters"])
    theirs = logging.getLogger("bitsandbytes.backends.cpu.ops")
    theirs.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    theirs.warning("Something else.")
    assert caplog.messages == ["Something else."]
