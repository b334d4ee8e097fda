"""JSON that people write by hand: what is wrong with it, in words that need no knowledge of JSON."""

from __future__ import annotations

import json
import re
from typing import Any

_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"(?P<key>\s*:)?|[{}\[\]]')
_TOO_LONG = re.compile(r"\d{1000}")
WORDS = {
    "Expecting property name": "a name in double quotes is expected here",
    "Illegal trailing comma": "take away the comma before the bracket",
    "Expecting ':' delimiter": "between a name and its value there is a colon",
    "Expecting ',' delimiter": "a comma is missing before this",
    "Expecting value": "a value is expected here: a number, a text in double quotes, true, false or null",
    "Extra data": "there is more behind the end",
    "Unterminated string": "a text that begins here has no closing quotation mark",
    "Invalid control character": "a tab or another control character in a text is written as in \\t",
    "Invalid \\escape": "a backslash in a text is written twice, as in C:\\\\models; a slash does as well",
    "Invalid \\uXXXX escape": "behind \\u there are four digits of a character; a backslash in a text is written twice",
}
"""By how the library's own words begin."""


def read(text: str) -> Any:
    """What JSON says. Raises JSONDecodeError, its `msg` in plain words and its `lineno` where to look, also for a key
    that stands twice in an object, one of whose values would be lost.
    """
    text = text.removeprefix("\ufeff")
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(_plain(error.msg, text, error.pos), text, error.pos) from None
    except RecursionError:
        raise json.JSONDecodeError("brackets stand in brackets, far too many", text, 0) from None
    except ValueError:  # Python reads no number of so many digits
        place = long.start() if (long := _TOO_LONG.search(text)) else 0
        raise json.JSONDecodeError("this number has thousands of digits", text, place) from None
    _refuse_twins(text)
    return found


def _plain(message: str, text: str, place: int) -> str:
    rest = text[place:]
    if not rest.strip():
        return "it ends too soon: a closing bracket is missing" if text.strip() else "there is nothing in it"
    if rest[0] in "}]" and text[:place].rstrip().endswith(","):
        message = "Illegal trailing comma"
    elif rest[0] in "'“”‘’„«»":
        return "names and texts stand in straight double quotes"
    elif rest.startswith(("//", "/*", "#")):
        return "JSON knows no comments; take this one away"
    elif rest[0].isdigit() and re.search(r"[:\[]\s*-?\d+,$", text[:place].rstrip()):
        return "a number has a point, not a comma, as in 0.001"
    elif rest.startswith(("True", "False", "None")):
        return "it is written true, false or null, in small letters and without quotes"
    elif message.startswith("Invalid control") and re.search(r'[^\\]\\",?$', text[:place].rstrip()):
        return "the backslash before a quotation mark hides it; a backslash in a text is written twice"
    elif message.startswith("Invalid control") and rest[0] in "\r\n":
        return "a text goes over the end of its line; a line break in it is written \\n"
    return next((words for begins, words in WORDS.items() if message.startswith(begins)), message)


def _refuse_twins(text: str) -> None:
    """Raise JSONDecodeError at the first key that an object of this JSON has already had."""
    inside: list[set[str]] = []
    for token in _TOKENS.finditer(text):
        if token["key"]:
            key = json.loads(token[0].removesuffix(token["key"]))
            if key in inside[-1]:
                raise json.JSONDecodeError(f'"{key}" is given twice; take one away', text, token.start())
            inside[-1].add(key)
        elif token[0] in "{[":
            inside.append(set())
        elif token[0] in "}]":
            inside.pop()
