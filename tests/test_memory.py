"""What the system is asked for, counted as pages in a process of its own: how glibc is set holds to its end."""

import os
import subprocess
import sys

import pytest

TIMES = 20
FREED_AND_ASKED_FOR_AGAIN = f"""
import resource, sys, torch
from trainer import memory
if sys.argv[1] == "kept":
    memory.keep()
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def some_steps():
    for _ in range({TIMES}):
        torch.ones(50 << 20, dtype=torch.uint8)
some_steps()
before = pages()
some_steps()
print(pages() - before)
"""


def asked_for(how: str) -> int:
    command = [sys.executable, "-c", FREED_AND_ASKED_FOR_AGAIN, how]
    small_pages = {**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=small_pages)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the system's memory is handed out otherwise")
def test_a_tensor_as_large_as_the_last_asks_the_system_for_nothing_where_memory_is_kept():
    pages = (50 << 20) // 4096
    assert asked_for("left alone") > TIMES * pages / 2
    assert asked_for("kept") < pages / 2
