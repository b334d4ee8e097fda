"""What is wrong with JSON that people write, in plain words at the right line."""

import json

import pytest

from trainer import jsontext, kohya
from trainer.errors import ConfigError
from trainer.schema import parse

WRONG = [
    ('{"a": 1\n "b": 2}', 2, "a comma is missing before this"),
    ('{"a": 1,\n}', (1, 2), "take away the comma before the bracket"),
    ('{"a": [1,\n 2,]}', 2, "take away the comma before the bracket"),
    ('{"a"\n 1}', 2, "there is a colon"),
    ('{\n"a": yes}', 2, "a number, a text in double quotes, true, false or null"),
    ('{\n"a": True}', 2, "true, false or null, in small letters"),
    ("{'a': 1}", 1, "straight double quotes"),
    ('{"a": 1,\n “b”: 2}', 2, "straight double quotes"),
    ("{a: 1}", 1, "a name in double quotes is expected"),
    ('{}\n{"a": 1}', 2, "there is more behind the end"),
    ('{\n"a": "x}', 2, "no closing quotation mark"),
    ('{"a": "x\ny"}', 1, "goes over the end of its line"),
    ('{"a": "x\ty"}', 1, r"a tab or another control character in a text is written as in \t"),
    (r'{"model": "C:\models\x"}', 1, r"a backslash in a text is written twice, as in C:\\models"),
    (r'{"model": "C:\users"}', 1, "a backslash in a text is written twice"),
    ('{"epoch": 3,\n "a": 1', 2, "it ends too soon"),
    ("", 1, "there is nothing in it"),
    ('{"a": 0,001}', 1, "a number has a point, not a comma"),
    ('{"a": 1, // one\n "b": 2}', 1, "JSON knows no comments"),
    ('{"a": 1\n # one\n}', 2, "JSON knows no comments"),
    ('{"a": "D:\\\\img\\",\n "b": 2}', 1, "the backslash before a quotation mark hides it"),
    ('{"a": 1,\n "a": 2,\n "b": {"a": 3}}', 2, '"a" is given twice; take one away'),
    ('{"b": {"a": 1},\n "c": [{"a": 1}, {"a": 2}],\n "a": 3,\n "a": 4}', 4, '"a" is given twice'),
    (
        r"""{"C:\\m": 1,
 "x": "\"C:\\m\":", "C:\\m": 2}""",
        2,
        "is given twice",
    ),
    ("[" * 100_000, 1, "far too many"),
    ('{\n"a": ' + "1" * 5000 + "}", 2, "thousands of digits"),
]


@pytest.mark.parametrize(("text", "line", "words"), WRONG, ids=[words for *_, words in WRONG])
def test_what_is_wrong_is_told_at_its_line_in_plain_words(text, line, words):
    with pytest.raises(json.JSONDecodeError) as told:
        jsontext.read(text)
    assert words in told.value.msg
    assert told.value.lineno in (line if isinstance(line, tuple) else (line,))  # Python 3.13 points at the comma


def test_what_is_right_is_read_also_behind_the_mark_that_windows_writes():
    right = '{"a": [1, null, "a\\":"], "b": {"a": "ü", "c": ":"}, "c": {"a": {}}}'
    assert jsontext.read("\ufeff" + right) == json.loads(right)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (b'{\n "epoch": 3\n "network_dim": 8\n}', 'mine.json", line 3: a comma is missing before this.'),
        (b'{"epoch": 3,\n "epoch": 4}', 'line 2: "epoch" is given twice; take one away.'),
        ('{"epoch": 3}'.encode("utf-16"), "is no text in UTF-8. Save it as UTF-8."),
    ],
)
def test_a_preset_file_is_refused_with_the_line(tmp_path, written, words):
    path = tmp_path / "mine.json"
    path.write_bytes(written)
    with pytest.raises(ConfigError) as told:
        kohya.load(path)
    assert words in str(told.value)


def test_a_path_whose_backslashes_were_taken_for_tabs_and_line_breaks_is_told():
    preset = kohya.read(jsontext.read(r'{"pretrained_model_name_or_path": "C:\new\train.safetensors"}'))
    with pytest.raises(ConfigError) as told:
        parse(preset.values)
    assert r"holds a line break, a tab or the like, which no path does. In JSON, a backslash is written twice" in str(
        told.value
    )
