"""Gradio, imported in half the time, and without its reports home."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported


@contextmanager
def _no_stub_files() -> Iterator[None]:
    """Keep Gradio from writing its type stubs anew.

    It parses its own source for that at every import, 1.6 s of 3.3 s, and writes beside its code.
    Classes whose file cannot be found are passed over.
    """
    find = inspect.getfile

    def getfile(thing: object) -> str:
        if str(getattr(thing, "__module__", "")).startswith("gradio."):
            raise OSError("no stubs wanted")
        return find(thing)  # type: ignore[arg-type]

    inspect.getfile = getfile  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.getfile = find


with _no_stub_files():
    import gradio as gr

__all__ = ["gr"]
