import json
import re

import gradio as gr
import pytest

from gui import form
from trainer.errors import ConfigError
from trainer.schema import PARAMETERS, Section, defaults, parse


def parameter(key):
    return PARAMETERS[key]


def test_defaults_survive_the_way_through_the_form():
    assert form.read(form.fill({})) == defaults()


@pytest.mark.parametrize(
    ("key", "value", "shown", "held"),
    [
        ("learning_rate", 1e-4, "0.0001", 0.0001),
        ("learning_rate", "1e-4", "1e-4", 0.0001),
        ("text_encoder_lr", 5e-05, "5e-5", 5e-05),
        ("text_encoder_lr", 0, "0", 0),
        ("text_encoder_lr", "", "", ""),
        ("max_train_steps", None, "", ""),
        ("network_dim", "8", "8", 8),
        ("network_dim", 8.0, "8", 8),
        ("network_dim", "8.0", "8.0", 8),
        ("network_alpha", "16", "16", 16),
        ("network_dim", "eight", "eight", "eight"),
        ("network_dim", "1_000", "1_000", "1_000"),
        ("learning_rate", "nan", "nan", "nan"),
        ("learning_rate", "1e999", "1e999", "1e999"),
        ("seed", 2**63 - 1, str(2**63 - 1), 2**63 - 1),
        ("max_resolution", 512, "512", "512"),
        ("training_comment", "0", "0", "0"),
        ("cache_latents", False, False, False),
        ("cache_latents", "true", True, True),
        ("cache_latents", "False", False, False),
        ("cache_latents", 0, False, False),
        ("optimizer", "Prodigy", "Prodigy", "Prodigy"),
        ("sample_prompts", "a\n\nb  ", "a\n\nb  ", "a\n\nb  "),
    ],
)
def test_a_value_is_shown_and_held(key, value, shown, held):
    assert form.shown(parameter(key), value) == shown
    assert form.held(parameter(key), shown) == held
    assert type(form.held(parameter(key), shown)) is type(held)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("epoch", "a whole number from 1 to 1,000,000"),
        ("max_train_steps", "a whole number from 0 to 100,000,000"),
        ("save_every_n_steps", "is further from 0 than 9223372036854775807; lower it"),
    ],
)
def test_a_number_too_large_for_json_stays_text_and_is_named(key, told):
    entry = "9" * 20
    assert form.held(PARAMETERS[key], entry) == entry
    with pytest.raises(ConfigError) as caught:
        parse({key: entry})
    (problem,) = caught.value.problems
    assert problem.key == key and told in problem.message


def test_what_a_preset_does_not_name_goes_back_to_its_default():
    entries = form.fill({"network_dim": 64})
    assert entries["network_dim"] == "64"
    assert entries["epoch"] == form.shown(parameter("epoch"), parameter("epoch").default)


def test_a_switch_that_cannot_be_read_shows_its_default_and_is_named():
    assert form.fill({"cache_latents": "perhaps"})["cache_latents"] is True
    assert [p.key for p in form.problems({"cache_latents": "perhaps"})] == ["cache_latents"]


def test_names_that_are_no_parameters_are_passed_over():
    assert form.read({"network_dim": "4", "__class__": "x"}) == {"network_dim": 4}


def test_the_table_knows_every_parameter_and_can_be_sent():
    table = json.loads(json.dumps(form.table()))
    assert [row["key"] for row in table] == list(PARAMETERS)
    assert all(row["help"] and row["label"] for row in table)


def test_every_rule_can_be_met_by_what_a_widget_shows():
    for row in form.table():
        for other, values in row["when"].items():
            entries = {form.shown(parameter(other), value) for value in values}
            assert entries == set(values), f"{row['key']} waits for {values} of {other}, which never shows that"


def test_every_section_of_the_schema_has_a_tab_of_its_own_name():
    assert {row["tab"] for row in form.table()} <= {section.tab for section in Section}


def test_ids_are_usable_in_selectors():
    for key in PARAMETERS:
        assert re.fullmatch(r"[\w-]+", form.field_id(key))


def test_empty_number_boxes_mean_what_the_schema_says():
    entries = {k: "" if isinstance(v, str) else v for k, v in form.fill({}).items()}
    entries.update(output_name="x", max_resolution="512,512")
    for key, p in PARAMETERS.items():
        if p.kind == "choice":
            entries[key] = p.default
    parse(form.read(entries))


def test_a_secret_is_hidden_while_it_is_typed_and_never_filled_in():
    with gr.Blocks():
        made = dict(form.widgets("Advanced"))
    assert made["wandb_api_key"].type == "password"
    assert made["wandb_api_key"].value == ""


@pytest.mark.parametrize("key", [key for key, p in PARAMETERS.items() if p.kind == "switch"])
@pytest.mark.parametrize("value", [True, False, "true", "0", 1.0])
def test_every_switch_of_a_preset_is_shown_as_it_stands_whatever_the_other_settings(key, value):
    expected = value in (True, "true", 1.0)
    assert form.read(form.fill({key: value}))[key] is expected
