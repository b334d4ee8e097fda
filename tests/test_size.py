"""How large a network becomes, without building it."""

import pytest

from tests.test_training import prepared
from trainer import schema
from trainer.schema import defaults
from trainer.size import size_of


@pytest.mark.parametrize("changes", [{}, {"text_encoder_lr": 0}, {"unet_lr": 0}])
def test_it_is_the_size_of_the_network_that_is_built(settings, tmp_path, changes):
    settings |= {"cache_latents": False, "network_dim": 6, **changes}
    network = prepared(settings, tmp_path).network
    size = size_of(schema.parse(settings))
    assert (size.modules, size.weights) == (len(network.layers), sum(p.numel() for p in network.parameters()))


def test_where_only_building_it_tells_there_is_none(tmp_path):
    for changes in ({"LoRA_type": "LyCORIS/LoHa"}, {"pretrained_model_name_or_path": str(tmp_path / "gone")}):
        assert size_of(schema.parse(defaults() | changes)) is None
