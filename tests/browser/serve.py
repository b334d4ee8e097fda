"""The page with the stand-in for the trainer: the same arguments as app.py."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import app  # noqa: E402

if __name__ == "__main__":
    sys.exit(app.main(trainer=(sys.executable, str(ROOT / "tests" / "gui" / "fake_trainer.py"))))
