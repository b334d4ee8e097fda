"""The page with the stand-in for the trainer, served by a process that is forked once Gradio is imported."""

import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORTED_ONCE = ["app", "gui.page", "gui.desk", "gui.login", "gui.view"]
FAKE_TRAINER = (sys.executable, str(ROOT / "tests" / "gui" / "fake_trainer.py"))


def serve(words: tuple[str, ...], tell: Connection) -> None:
    """Serve as app.py does with these arguments; what it prints goes to `tell`."""
    os.dup2(tell.fileno(), 1)
    tell.close()
    os.chdir(ROOT)
    import app
    from gui import waiting

    waiting.LOOK_AGAIN_S /= 8  # as the page's own waits are shortened in Chromium
    os.environ |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    sys.exit(app.main(list(words), trainer=FAKE_TRAINER))
