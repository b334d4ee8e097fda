"""Sample prompts and their flags."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.prompts import Prompt, parse


def test_every_flag_is_read():
    assert parse("a cat, evening --n blurry, dark --w 512 --h 768 --d 7 --l 6.5 --s 20") == [
        Prompt("a cat, evening", "blurry, dark", 512, 768, 7, 6.5, 20, line=1)
    ]


def test_without_flags_the_defaults_are_those_of_sd_scripts():
    (prompt,) = parse("a cat")
    assert (prompt.negative, prompt.width, prompt.height, prompt.seed) == ("", None, None, None)
    assert (prompt.cfg_scale, prompt.steps) == (7.5, 30)


def test_comments_and_empty_lines_are_passed_over_and_lines_keep_their_number():
    prompts = parse("# my prompts\n\na cat\r\n  # --q is no flag here\n a dog # not a comment \n")
    assert [(p.prompt, p.line) for p in prompts] == [("a cat", 3), ("a dog # not a comment", 5)]
    assert parse(" \n#\n") == []


def test_flags_in_capitals_and_dashes_in_the_text_are_fine():
    (prompt,) = parse("a well-known cat -- at night --W 64")
    assert (prompt.prompt, prompt.width) == ("a well-known cat -- at night", 64)


def test_a_line_of_flags_alone_draws_without_a_prompt():
    assert parse("--d 1 --n bad")[0] == Prompt("", "bad", seed=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cat --q 3", '"--q" is not a flag; there are --n, --w, --h, --d, --l, --s'),
        ("cat --w512", '"--w512" is not a flag'),
        ("cat --w 500", '--w is "500"; it must be a whole number from 64 to 4096, a multiple of 8'),
        ("cat --h 100000", '--h is "100000"'),
        ("cat --w", '--w is ""'),
        ("cat --w 5e2", '--w is "5e2"'),
        ("cat --s 0", '--s is "0"; it must be a whole number from 1 to 1000'),
        ("cat --d -1", '--d is "-1"; it must be a whole number, 0 or more'),
        ("cat --d 99999999999999999999", "--d is"),
        ("cat --l nan", '--l is "nan"; it must be a number from 0 to 100'),
        ("cat --l seven", '--l is "seven"'),
        ("cat --n", "--n needs a text behind it"),
        ("cat --w 64 --w 64", "--w stands there twice"),
    ],
)
def test_a_bad_flag_names_its_line_and_what_is_allowed(line, message):
    with pytest.raises(ConfigError) as caught:
        parse(f"good one\n\n{line}")
    (problem,) = caught.value.problems
    assert str(problem).startswith("Sample prompts (sample_prompts): line 3: ")
    assert message in problem.message


def test_all_bad_flags_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse("a --w 1 --q 2\nb\nc --s x")
    assert len(caught.value.problems) == 3


@settings(deadline=None, max_examples=300)
@given(st.text(st.sampled_from("--nwhdls 0159.#\n\tab(:)é")) | st.text())
def test_any_text_is_prompts_or_a_problem_that_names_its_line(text):
    lines = len(text.splitlines())
    try:
        assert all(1 <= prompt.line <= lines for prompt in parse(text))
    except ConfigError as error:
        found = {(p.key, p.message.partition(" ")[0]) for p in error.problems}
    else:
        found = {("sample_prompts", "line")}
    assert found == {("sample_prompts", "line")}
