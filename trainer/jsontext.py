"""JSON that people write by hand: what is wrong with it, in words that need no knowledge of JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

WORDS = {
    "Expecting property name": "a name in double quotes is expected here; behind the last entry there is no comma",
    "Illegal trailing comma": "behind the last entry there is no comma",
    "Expecting ':' delimiter": "between a name and its value there is a colon",
    "Expecting ',' delimiter": "a comma is missing before this",
    "Expecting value": "a value is expected here: a number, a text in double quotes, true, false or null",
    "Extra data": "there is more behind the end",
    "Unterminated string": "a text that begins here has no closing quotation mark",
    "Invalid control character": "a text goes over the end of its line; a line break in it is written \\n",
    "Invalid \\escape": "a backslash in a text is written twice, as in C:\\\\models; a slash does as well",
    "Invalid \\uXXXX escape": "behind \\u there are four digits of a character; a backslash in a text is written twice",
}
"""By how the library's own words begin."""


def read(text: str) -> Any:
    """What JSON says. Raises JSONDecodeError, its `msg` in plain words, also where a key stands twice in an object:
    one of its values would be lost.
    """

    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            places = [found.start() for found in re.finditer(rf'"{re.escape(twice)}"\s*:', text)]
            raise json.JSONDecodeError(f'"{twice}" is given twice', text, places[-1] if places else 0)
        return dict(pairs)

    text = text.removeprefix("\ufeff")
    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        message = next((words for begins, words in WORDS.items() if error.msg.startswith(begins)), error.msg)
        raise json.JSONDecodeError(message, text, error.pos) from None
    except RecursionError:
        raise json.JSONDecodeError("brackets stand in brackets a thousand times", text, 0) from None
