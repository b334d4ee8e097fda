"""Whatever is sent to the page's functions: an answer or a clear error, and no file outside the roots."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.exceptions import HTTPException

from gui.asking import SHAPES
from gui.desk import Desk
from gui.files import Roots
from gui.presets import Presets
from gui.runs import Runs
from gui.tools import BACKUPS, PATHS
from trainer.run import Run
from trainer.schema import PARAMETERS
from trainer.tools.commands import TOOLS

RUN = "20260101-000000-cat"
NOTHING = ("/usr/bin/env", "printf", '{"problems": []}')
"""In the trainer's place: finds nothing wrong, trains nothing."""


@pytest.fixture
def place(tmp_path):
    """Roots with a run, a preset and an image, and beside them what nobody may read or write."""
    top = tmp_path / "top"
    inside, outside = top / "inside", top / "outside"
    pictures = inside / "pictures" / "1_cat"
    for folder in (pictures, outside, top / "shipped", inside / "models"):
        folder.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(pictures / "a.png")
    (pictures / "a.txt").write_text("a cat, grey")
    Image.new("RGB", (64, 64)).save(outside / "private.png")
    for name in ("private.txt", "private.json", "private.safetensors"):
        (outside / name).write_text('{"secret": "hunter2"}')
    (inside / "leads_out").symlink_to(outside)
    (pictures / "leads_out.png").symlink_to(outside / "private.png")
    (pictures / "leads_out.txt").symlink_to(outside / "private.txt")
    (top / "shipped" / "first-steps.json").write_text("{}")
    run = Run(top / "runs" / RUN)
    run.samples.mkdir(parents=True)
    run.config.write_text("{}")
    run.log.write_text("log")
    events = [
        {
            "type": "sample",
            "time": 1,
            "path": "../../../outside/private.png",
            "prompt": "",
            "index": 0,
            "seed": 1,
            "step": 1,
        },
        {
            "type": "saved",
            "time": 1,
            "path": str(outside / "private.safetensors"),
            "step": 1,
            "epoch": 1,
            "what": "final",
        },
        {"type": "saved", "time": 1, "path": str(outside), "step": 1, "epoch": 1, "what": "state"},
    ]
    run.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    return top


@pytest.fixture
def desk(place):
    allowed = []
    desk = Desk(
        runs=Runs(place / "runs", place, NOTHING),
        presets=Presets(place / "shipped", place / "runs" / "presets"),
        roots=Roots([place / "inside"]),
        allow=allowed.append,
    )
    desk.allowed = allowed
    return desk


def ask(desk, name, question):
    """A function's answer as the page gets it; an error of a status below 500 as its text."""
    function = {function.__name__: function for function in desk.functions()}[name]
    try:
        return json.dumps(function(question))
    except HTTPException as error:
        refusal = error
    assert 400 <= refusal.status_code < 500
    assert refusal.detail and "Traceback" not in refusal.detail
    return refusal.detail


def placed(question, top):
    """The question with {top} filled in."""
    if isinstance(question, dict):
        return {key: placed(value, top) for key, value in question.items()}
    if isinstance(question, list):
        return [placed(value, top) for value in question]
    return question.replace("{top}", str(top)) if isinstance(question, str) else question


def untouched(place):
    outside = {path.name: path.read_bytes() for path in (place / "outside").iterdir()}
    assert set(outside) == {"private.png", "private.txt", "private.json", "private.safetensors"}
    assert all(outside[f"private.{end}"] == b'{"secret": "hunter2"}' for end in ("txt", "json", "safetensors"))
    assert {path.name for path in place.iterdir()} <= {"inside", "outside", "runs", "shipped"}
    assert [path.name for path in (place / "shipped").iterdir()] == ["first-steps.json"]


def test_every_function_says_how_it_must_be_asked(desk):
    assert {function.__name__ for function in desk.functions()} == set(SHAPES)


odd_words = st.sampled_from(
    ["", ".", "..", "/", "~", "~root", "NaN", "1e999", "-1", "0x10", "\0", "\ud800", "a" * 5000, "\n", "embedded:../..",
     "${HOME}", "$(id)", "; ls", "__import__('os')", "<script>", "shipped/../../outside/private", "own/x", "9" * 400,
     RUN, "20260101-000000-../..", "stop", "kill", "undo", "write", "replace", "add", "remove", "inspect", "doctor",
     "place", "begin", "unpack", "drop", "é", "AAAA", "0" * 32]
)  # fmt: skip
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), odd_words)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | odd_words, inner, max_size=3),
    max_leaves=6,
)
FOLDERS = st.sampled_from(["{top}/inside/pictures", "{top}/inside/leads_out", "{top}/outside", "{top}", "", "..", "\0"])
FIELDS = {
    "entries": st.builds(
        lambda folder, entries: {"train_data_dir": folder, **entries},
        FOLDERS,
        st.dictionaries(st.sampled_from(sorted(PARAMETERS)), scalars, max_size=4),
    ),
    "kept": st.dictionaries(st.text(max_size=5), anything, max_size=3),
    "text": st.builds(json.dumps, st.dictionaries(st.sampled_from(sorted(PARAMETERS)), anything, max_size=3))
    | st.sampled_from(["[" * 100_000, "9" * 5000, '"\\ud800"', "{", "NaN"]),
    "paths": st.lists(FOLDERS.map(lambda folder: f"{folder}/1_cat/a.png") | odd_words, max_size=3),
    "runs": st.lists(odd_words, max_size=3),
    **dict.fromkeys(("run", "word", "name", "id", "how", "tool", "follow", "find", "by", "data"), odd_words),
    "path": FOLDERS | odd_words,
    "target": FOLDERS | odd_words,
    "step": st.sampled_from(["place", "begin", "add", "unpack", "drop"]) | odd_words,
    **{key: st.integers() for key in ("events", "log", "offset", "batch", "size")},
    **{key: st.booleans() for key in ("files", "sure", "replace", "end")},
}


lists = st.lists(odd_words, max_size=3)
BY_KIND = {
    str: odd_words,
    int: st.integers(),
    bool: st.booleans(),
    list[str]: lists,
    list[list[str]]: st.lists(lists, max_size=3),
}
PLAIN_BY_KIND = {str: "1", int: 0, bool: True, list[str]: ["x"], list[list[str]]: [["seed", "1, 2"]]}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_forged_questions_get_an_answer_or_a_clear_refusal(desk, place, name):
    needed = {
        key: FIELDS[key] if key in FIELDS else BY_KIND[kind]
        for key, kind in SHAPES[name].items()
        if not key.endswith("?")
    }
    maybe = {key.removesuffix("?"): kind for key, kind in SHAPES[name].items() if key.endswith("?")}
    others = {key: FIELDS[key] | anything for key in FIELDS if key not in needed}
    others |= {key: BY_KIND[kind] for key, kind in maybe.items() if key not in FIELDS}
    right = {key: FIELDS[key] if key in FIELDS else BY_KIND[kind] for key, kind in maybe.items()}
    wrong = st.fixed_dictionaries({}, optional=dict.fromkeys(needed, anything)) | anything

    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.fixed_dictionaries(needed, optional=others) | st.fixed_dictionaries(needed, optional=right) | wrong)
    def forge(question):
        answer = ask(desk, name, placed(question, place))
        assert "hunter2" not in answer

    forge()
    untouched(place)
    assert all((place / "runs") in path.resolve().parents for path in desk.allowed)


ESCAPES = [
    "{top}/outside",
    "{top}/outside/private.txt",
    "{top}/outside/private.safetensors",
    "{top}/inside/../outside/private.json",
    "{top}/inside/leads_out",
    "{top}/inside/leads_out/private.txt",
    "{top}/inside/pictures/1_cat/leads_out.png",
    "../../outside/private",
    "../outside/private.json",
    "own/../../../outside/private",
    "shipped/../../outside/private",
    f"{RUN}/../../outside",
    "../outside",
    "private.safetensors",
    "private.json",
    "~root/private",
    "/etc/passwd",
    "{top}/outside/private.txt\0.png",
]
PLAIN = {
    "entries": {"train_data_dir": "{top}/inside/pictures"}, "kept": {}, "text": "{}", "paths": [], "runs": [RUN],
    "run": RUN, "word": "sample", "name": "mine", "id": "own/mine", "path": "", "how": "write", "tool": "inspect",
    "follow": RUN, "events": 0, "log": 0, "offset": 0, "files": True, "batch": 0, "step": "begin", "target": "", "size": 0, "data": "",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_no_function_reads_or_writes_outside_the_roots(desk, place, name):
    shape = {key.removesuffix("?"): kind for key, kind in SHAPES[name].items()}
    needed = {key: PLAIN[key] if key in PLAIN else PLAIN_BY_KIND[kind] for key, kind in shape.items()}
    for field, value in needed.items():
        if isinstance(value, bool | int | dict):
            continue
        for escape in ESCAPES:
            order = {**needed, "text": "edited", field: [escape] if isinstance(value, list) else escape}
            answer = ask(desk, name, placed({**order, "sure": True, "replace": True}, place))
            shown = answer.replace(json.dumps(placed(escape, place))[1:-1], "")  # what was asked for may be named
            assert "hunter2" not in answer and "root:" not in answer
            assert "data:image" not in answer
            assert "private.png" not in shown and ': "private' not in shown, (field, escape)
    untouched(place)
    assert all(path.resolve().is_relative_to(place / "runs") for path in desk.allowed)


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_no_tool_reads_or_writes_outside_the_roots(desk, place, tool):
    entries = {
        p.key: "{top}/inside/x.safetensors"
        for p in TOOLS[tool].parameters.values()
        if p.kind in PATHS and p.key != BACKUPS
    }
    for key in entries:
        for escape in [e for e in ESCAPES if e.startswith(("{top}", "..", "~", "/"))]:
            order = {"tool": tool, "entries": {**entries, key: escape}}
            (told,) = [
                p for p in json.loads(ask(desk, "tool_start", placed(order, place)))["problems"] if p["key"] == key
            ]
            assert "outside" in told["message"] or "no file" in told["message"], (key, escape)
    untouched(place)


def test_what_a_run_only_claims_to_have_saved_is_not_handed_out(desk, place):
    """The run's events say that it saved a file that lies outside of its folder and of its output folder."""
    assert json.loads(ask(desk, "files", {"run": RUN}))["files"] == [["log.txt", 3], ["config.json", 2]]
    run = Run(place / "runs" / RUN)
    run.output.mkdir()
    (run.output / "a.safetensors").symlink_to(place / "outside" / "private.safetensors")
    with run.events.open("a") as file:
        file.write(
            json.dumps(
                {"type": "saved", "time": 1, "path": "output/a.safetensors", "step": 1, "epoch": 1, "what": "final"}
            )
            + "\n"
        )
    assert json.loads(ask(desk, "download", {"run": RUN, "name": "a.safetensors"}))["path"] is None
    run.config.write_text(json.dumps({"output_dir": str(place / "outside")}))
    assert json.loads(ask(desk, "download", {"run": RUN, "name": "private.safetensors"}))["path"]
