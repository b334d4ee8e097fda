"""Which test proves the effect of which parameter: `@pytest.mark.proves("key", …)` on the test says it.

`pytest --proofs docs/proofs.md` writes the table of a whole run: parameter, tests, outcome.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.schema import PARAMETERS


class Proofs:
    """Collects the outcomes of marked tests and writes them down at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tests: dict[str, set[str]] = {key: set() for key in PARAMETERS}
        self._failed: set[str] = set()
        self._ran: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            proved = [key for mark in item.iter_markers("proves") for key in mark.args]
            item.user_properties.append(("proves", proved))  # comes back with the outcome from wherever it runs
            self._note(item.nodeid, proved)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == "proves":
                self._note(report.nodeid, value)  # type: ignore[arg-type]
        if report.when == "call":
            self._ran.add(report.nodeid.split("[")[0])
        if report.failed:
            self._failed.add(report.nodeid.split("[")[0])

    def _note(self, test: str, proved: list[str]) -> None:
        for key in proved:
            self._tests[key].add(test.split("[")[0])

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return  # one of several processes; the one that asked them writes
        self.path.write_text(self.table())

    def table(self) -> str:
        lines = [
            "# What proves each parameter",
            "",
            "Made by `pytest --proofs docs/proofs.md`: every parameter, the tests of its effect, and how they ended in that",
            "run (with `--collect-only` none is run).",
            "",
            "| parameter | key | tests | |",
            "|---|---|---|---|",
        ]
        for key, parameter in PARAMETERS.items():
            tests = sorted(self._tests[key])
            names = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in tests) or "none"
            outcome = (
                "failed" if self._failed & set(tests) else "passed" if tests and self._ran >= set(tests) else "not run"
            )
            lines.append(f"| {parameter.label} | `{key}` | {names} | {outcome} |")
        return "\n".join(lines) + "\n"
