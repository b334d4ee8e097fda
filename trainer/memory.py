"""The main memory that glibc hands out: what it keeps of what was freed, and what goes back to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MOST = 2**31 - 1


def give_back() -> None:
    """Return what was freed to the system: glibc keeps it, so that a packed model would take more than a whole one."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def keep() -> None:
    """From now on what is freed waits for what is asked for next: a step's tensors have the sizes of the one before.

    Else glibc returns large tensors to the system, which clears each page that it hands out again. See mallopt(3).
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, MOST)
        libc.mallopt(M_TRIM_THRESHOLD, MOST)
