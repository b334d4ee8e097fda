"""What each LoRA type's row says, and what the form and the settings make of it."""

from __future__ import annotations

import pytest

from trainer import networks, schema
from trainer.schema import PARAMETERS
from trainer.schema.algorithms import TYPES, USES


@pytest.mark.parametrize("label", TYPES)
def test_every_type_has_its_file_with_modules_and_formula_and_controls_that_exist(label):
    assert USES[label] - set(PARAMETERS) == set()
    file = networks.algorithm(label)
    assert callable(file.module_for) and callable(file.weight_update)


def test_the_form_shows_a_types_controls_and_no_other_types():
    for label, keys in USES.items():
        for key in set().union(*USES.values()):
            assert schema.shown(key, {"LoRA_type": label}) == (key in keys), (label, key)


def test_a_control_that_the_type_does_not_use_counts_as_unset():
    given = {"conv_dim": 7, "conv_alpha": 3}
    assert schema.parse(given).network.conv_rank == 1
    assert schema.parse(given | {"LoRA_type": "Kohya LoCon"}).network.conv_rank == 7
