"""What each LoRA type's file says about itself, and what the form and the settings make of it."""

from __future__ import annotations

from typing import get_args

from trainer import networks, schema
from trainer.schema import PARAMETERS, algorithms
from trainer.schema.network import NetworkType


def test_the_types_to_choose_from_are_those_with_a_file():
    assert set(get_args(NetworkType)) == set(algorithms.USES)


def test_every_control_that_a_type_uses_exists_and_the_imported_files_say_the_same():
    for label, keys in algorithms.USES.items():
        assert keys - set(PARAMETERS) == set(), label
        assert keys == networks.algorithm(label).USES


def test_the_form_shows_a_types_controls_and_no_other_types():
    for label, keys in algorithms.USES.items():
        for key in set().union(*algorithms.USES.values()):
            assert schema.shown(key, {"LoRA_type": label}) == (key in keys), (label, key)


def test_a_control_that_the_type_does_not_use_counts_as_unset():
    given = {"conv_dim": 7, "conv_alpha": 3}
    assert schema.parse(given).network.conv_rank == 1
    assert schema.parse(given | {"LoRA_type": "Kohya LoCon"}).network.conv_rank == 7
