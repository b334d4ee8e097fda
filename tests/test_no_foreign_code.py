"""Nothing that a form, a preset or a file says becomes a program: what ruff's S rules forbid stays forbidden.

ruff finds eval, exec, pickle, shells and their like; here stands that nobody switches it off, and where a name
may be imported that is not written in the code.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "app.py", *sorted((ROOT / "gui").rglob("*.py")), *sorted((ROOT / "trainer").rglob("*.py"))]
FORBIDDEN = {"eval", "exec", "compile", "__import__", "breakpoint"}
FORBIDDEN_OF = {
    "os": {"system", "popen", "execv", "execve", "execvp", "spawnv", "startfile"},
    "subprocess": {"getoutput", "getstatusoutput"},
    "pickle": {"load", "loads"},
    "marshal": {"load", "loads"},
    "shelve": {"open"},
    "runpy": {"run_path", "run_module"},
    "yaml": {"load", "unsafe_load", "full_load"},
}
MAY_BE_SWITCHED_OFF = {"S311", "S603"}
"""Random numbers that are no secrets; a process that is started from a list of arguments, without a shell."""

TABLES = {
    "trainer/sampling.py": '"diffusers"',
    "trainer/networks/__init__.py": 'f"trainer.networks.{name}"',
    "trainer/optim.py": "row.module",
    "trainer/models/__init__.py": "family.module",
    "trainer/tools/commands.py": "f\"trainer.tools.{self.name.replace('-', '_')}\"",
}
"""Imports by a name from a table of this program, by file: a row of it is chosen, never a name given."""


def relative(path):
    return path.relative_to(ROOT).as_posix()


def calls(path):
    """Every call: (what is called, with dots; the call)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_given_is_run_as_a_program(path):
    for name, call in calls(path):
        module, _, function = name.rpartition(".")
        assert name not in FORBIDDEN, f"{name} in line {call.lineno}"
        assert function not in FORBIDDEN_OF.get(module, ()), f"{name} in line {call.lineno}"
        for word in call.keywords:
            assert word.arg != "shell", f"a shell in line {call.lineno}"
            assert word.arg != "trust_remote_code", f"code of others in line {call.lineno}"
            if name == "torch.load" and word.arg == "weights_only":
                assert ast.unparse(word.value) == "True"
        if name == "torch.load":
            assert "weights_only" in {word.arg for word in call.keywords}, f"a pickle in line {call.lineno}"


def test_names_from_elsewhere_are_imported_only_by_the_program_s_own_tables():
    found = {
        relative(path): ast.unparse(call.args[0]).replace("'diffusers'", '"diffusers"')
        for path in FILES
        for name, call in calls(path)
        if name.endswith("import_module")
    }
    quotes = str.maketrans("'", '"')
    assert {k: v.translate(quotes) for k, v in found.items()} == {k: v.translate(quotes) for k, v in TABLES.items()}


def test_ruff_looks_for_it_and_nobody_tells_it_not_to():
    lint = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.ruff.lint]")[1]
    assert '"S"' in lint.split("]")[0] and not re.search(
        r'^    "S(?!101)\d', lint.split("[tool.mypy]")[0], re.MULTILINE
    )
    for path in FILES:
        for codes in re.findall(r"#\s*(?:ruff: )?noqa:([A-Z0-9, ]+)", path.read_text(encoding="utf-8")):
            assert set(re.findall(r"S\d{3}", codes)) <= MAY_BE_SWITCHED_OFF, relative(path)


def test_no_line_switches_all_rules_off():
    assert not [
        relative(path) for path in FILES if re.search(r"#\s*noqa\s*$", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
