"""Additional parameters and the command line's settings."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import kohya, schema
from trainer.check import problems
from trainer.errors import ConfigError
from trainer.kohya import Preset
from trainer.schema import PARAMETERS
from trainer.schema.overrides import overrides


def additional(text, **values):
    return schema.parse({"additional_parameters": text} | values)


def refusal(text, **values):
    with pytest.raises(ConfigError) as caught:
        additional(text, **values)
    return caught.value.problems


@pytest.mark.proves("additional_parameters")
def test_a_known_name_sets_its_field_and_goes_before_the_form():
    config = additional("--max_train_steps 500 --seed=7 --flip_aug --unet_lr 3e-5", seed=1, unet_lr=1e-4)
    assert config.training.max_steps == 500
    assert config.training.seed == 7
    assert config.data.flip is True
    assert config.optim.unet_lr == 3e-5
    assert additional("--flip_aug false", flip_aug=True).data.flip is False


def test_values_with_blanks_quotes_and_dashes_are_read():
    config = additional(
        """--training_comment "two words" --optimizer_args '"weight_decay=0.1" "betas=0.9,0.99"' --adaptive_noise_scale -0.5 --noise_offset 0.1"""
    )
    assert config.saving.comment == "two words"
    assert config.optim.arguments == {"weight_decay": 0.1, "betas": (0.9, 0.99)}
    assert config.objective.adaptive_noise_scale == -0.5


def test_words_as_sd_scripts_takes_them_are_read():
    config = additional(
        '--lr_scheduler_args "min_lr_rate=0.1" --optimizer_args "weight_decay=0.1" "betas=0.9, 0.99" --seed 7',
        lr_scheduler="cosine_with_min_lr",
    )
    assert config.optim.arguments == {"weight_decay": 0.1, "betas": (0.9, 0.99)}
    assert config.optim.scheduler_arguments == {"min_lr_rate": 0.1}
    assert config.training.seed == 7
    assert additional("--network_train_unet_only", unet_lr=1e-4).optim.text_encoder_lr == 0
    assert additional("--network_train_text_encoder_only --seed 7").optim.unet_lr == 0


@pytest.mark.parametrize(
    ("text", "group", "name", "value"),
    [
        ("--LoRA_type LoCon", "network", "type", "LyCORIS/LoCon"),
        ("--save_precision fp32", "saving", "precision", "float"),
        ("--mixed_precision fp32", "training", "precision", "no"),
        ("--optimizer adamw8bit", "optim", "optimizer", "AdamW8bit"),
        ("--xformers", "training", "attention", "xformers"),
        ("--xformers false", "training", "attention", "none"),
        ("--wandb --seed 7", "tracking", "trackers", "wandb"),
        ("--lora_network_weights a.safetensors", "network", "weights", "a.safetensors"),
        ("--stop_text_encoder_training_pct 10", "optim", "stop_text_encoder_percent", 10),
        ("--conv_dims " + ",".join("2" * 25), "blocks", "conv_ranks", (2,) * 25),
    ],
)
def test_older_keys_and_values_are_read_here_as_in_presets(text, group, name, value):
    for config in (additional(text), schema.parse(kohya.overridden(Preset({}), shlex.split(text)).values)):
        assert getattr(getattr(config, group), name) == value


def test_additional_parameters_can_be_given_on_the_command_line():
    words = ["--additional_parameters", "--network_dim 16", "--seed", "3"]
    config = schema.parse(kohya.overridden(Preset({}), words).values)
    assert (config.network.rank, config.training.seed) == (16, 3)
    assert schema.parse(kohya.overridden(Preset({}), ["--additional_parameters", "--flip_aug"]).values).data.flip


@pytest.mark.parametrize("key", [k for k, p in PARAMETERS.items() if p.kind in ("integer", "number")])
def test_every_number_of_the_schema_can_be_set(key):
    p = PARAMETERS[key]
    value = p.default if p.default is not None else int(16 * (p.minimum or 0)) or 1
    config = additional(f"--{key} {value}", **{})
    assert getattr(getattr(config, p.group), p.name) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--learning_rat 1", '"--learning_rat" is not a parameter; did you mean --learning_rate?'),
        ("--zzzzzz=3", '"--zzzzzz" is not a parameter.'),
        ("--zzzzzz 3 --flip_aug", '"--zzzzzz" is not a parameter.'),
        ("rm -rf /", '"rm" does not belong to a parameter'),
        ("--seed", "--seed needs a value"),
        ("--seed --flip_aug", "--seed needs a value"),
        ('--training_comment "open', "no closing quotation"),
        ("--wandb_api_key 123abc", "cannot stand here"),
        ("--additional_parameters x", "cannot stand here"),
    ],
)
def test_what_is_no_parameter_is_refused_naming_it(text, message):
    found = refusal(text)
    assert {p.key for p in found} == {"additional_parameters"}
    assert message in found[0].message
    assert "123abc" not in str(found)


def test_a_bad_value_is_refused_under_its_own_name_with_all_other_problems():
    found = refusal("--train_batch_size none --nonsense", learning_rate="fast")
    assert {p.key for p in found} == {"train_batch_size", "additional_parameters", "learning_rate"}


def test_conflicts_are_found_in_what_additional_parameters_set():
    assert {p.key for p in refusal("--color_aug")} == {"color_aug"}


def test_the_check_sees_them_too():
    checked = problems(Preset({"additional_parameters": "--train_batch_size 0 --what 1"}), decode=False)
    keys = {p.key for p in checked.problems if p.severity == "error"}
    assert {"train_batch_size", "additional_parameters"} <= keys


def test_the_command_line_goes_before_them():
    preset = Preset({"additional_parameters": "--seed 1 --epoch 3", "seed": 2})
    config = schema.parse(kohya.overridden(preset, ["--seed", "5"]).values)
    assert (config.training.seed, config.training.epochs) == (5, 3)
    assert kohya.overridden(preset, []) is preset


def test_the_command_line_names_all_that_is_wrong():
    with pytest.raises(ConfigError) as caught:
        kohya.overridden(Preset({}), ["--sed", "1", "stray"])
    assert [p.message.split()[0] for p in caught.value.problems] == ['"--sed"', '"stray"']


def test_they_never_reach_a_shell(tmp_path):
    mark = tmp_path / "touched"
    found = additional(f'--training_comment "$(touch {mark}) `touch {mark}`; touch {mark}"')
    assert found.saving.comment == f"$(touch {mark}) `touch {mark}`; touch {mark}"
    assert not mark.exists()


@settings(deadline=None, max_examples=200)
@given(st.text(st.sampled_from("--seed=flip_aug 17\"'\\$`;|\n")) | st.text())
def test_any_text_sets_fields_or_is_a_problem(text):
    try:
        config = additional(text)
    except ConfigError as error:
        found = error
    else:
        found = config.training.additional
    assert found == text.strip() or all(p.message for p in found.problems)


@given(st.lists(st.text()))
def test_any_words_are_settings_or_told(words):
    found, wrong = overrides(words, PARAMETERS)
    assert set(found) <= set(PARAMETERS)
    assert bool(found or wrong) == bool(words)
    assert overrides(shlex.split(shlex.join(words)), PARAMETERS) == (found, wrong)
