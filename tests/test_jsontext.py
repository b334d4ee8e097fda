"""What is wrong with JSON that people write, in plain words at the right line."""

import json

import pytest

from trainer import jsontext, kohya
from trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('{"a": 1\n "b": 2}', 2, "a comma is missing before this"),
        ('{"a": 1,}', 1, "behind the last entry there is no comma"),
        ('{"a"\n 1}', 2, "there is a colon"),
        ('{\n"a": True}', 2, "a number, a text in double quotes, true, false or null"),
        ("{'a': 1}", 1, "a name in double quotes is expected"),
        ('{}\n{"a": 1}', 2, "there is more behind the end"),
        ('{\n"a": "x}', 2, "no closing quotation mark"),
        ('{"a": "x\ny"}', 1, "goes over the end of its line"),
        (r'{"model": "C:\models\x"}', 1, r"a backslash in a text is written twice, as in C:\\models"),
        (r'{"model": "C:\users"}', 1, "a backslash in a text is written twice"),
        ('{"a": 1,\n "b": {"a": 2},\n "a": 3}', 3, '"a" is given twice'),
        ("[" * 100_000, 1, "brackets stand in brackets"),
    ],
)
def test_what_is_wrong_is_told_at_its_line_in_plain_words(text, line, words):
    with pytest.raises(json.JSONDecodeError) as told:
        jsontext.read(text)
    assert told.value.lineno == line and words in told.value.msg


def test_what_is_right_is_read_also_behind_the_mark_that_windows_writes():
    assert jsontext.read('\ufeff{"a": [1, null], "b": {"a": "ü"}}') == {"a": [1, None], "b": {"a": "ü"}}


def test_a_preset_file_is_refused_with_the_line(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{\n "epoch": 3\n "network_dim": 8\n}')
    with pytest.raises(ConfigError) as told:
        kohya.load(path)
    assert 'mine.json" is not JSON. Line 3: a comma is missing before this.' in str(told.value)
