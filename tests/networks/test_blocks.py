"""The U-Net's blocks: which layers they hold, and what weights, ranks and alphas of blocks do to the file."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from tests import reference
from trainer import networks, schema
from trainer.errors import ConfigError
from trainer.models import Target
from trainer.models.facts import FAMILIES
from trainer.networks.blocks import block_of, from_settings
from trainer.prepare import prepare
from trainer.run import EXIT_CONFIG, Run
from trainer.schema.blocks import Weights, parse_weights, rate_weights

SD, SDXL = (FAMILIES[name].blocks for name in ("sd1", "sdxl"))

BLOCKS = reference.read("blocks")
LAYER = re.compile(r"lora_unet_((?:down|up)_blocks_\d+_[a-z]+_\d+|mid_block_[a-z]+_\d+)_")
# The blocks of the tiny model's layers, and those of them with attention.
TINY, TINY_ATTENTION = {1, 3, 4, 12, 13, 14, 15, 16, 17}, {1, 12, 16, 17}


def layer_names() -> set[str]:
    return {key.split(".")[0] for key in reference.read("sd15_locon_keys")["tensors"]}


def test_every_layer_of_sd15_is_in_the_block_that_sd_scripts_says():
    names = {name for name in layer_names() if name.startswith("lora_unet")}
    assert len(names) == 278
    assert all(block_of(name) == BLOCKS["layers"][LAYER.match(name)[1]] for name in names)
    assert {block_of(name) for name in names} == set(range(25)) - {0}
    assert {block_of(name) for name in layer_names() - names} == {None}


@pytest.mark.parametrize(
    ("name", "block"), [("input_blocks_0", 1), ("input_blocks_8", 9), ("middle_block_1", 11), ("output_blocks_8", 21)]
)
def test_layers_of_sdxl_are_found_by_their_original_names(name, block):
    assert block_of(f"lora_unet_{name}_1_transformer_blocks_0_attn1_to_q") == block


@pytest.mark.parametrize("case", BLOCKS["weights"], ids=lambda case: "; ".join(case["settings"].values()))
def test_weights_of_blocks_are_those_of_sd_scripts(case):
    weights = rate_weights(schema.parse(case["settings"]).blocks, SD)
    assert weights == pytest.approx(case["blocks"], abs=1e-8)


def test_sdxl_has_9_and_3_and_9_blocks_between_two_untouched_entries():
    given = {"down_lr_weight": "zeros+.5", "mid_lr_weight": "0.1,0.2,0.3", "up_lr_weight": "linear"}
    weights = rate_weights(schema.parse(given).blocks, SDXL)
    assert weights == [1, *[0.5] * 9, 0.1, 0.2, 0.3, *[pytest.approx(i / 8) for i in range(9)], 1]
    assert len(weights) == SDXL.total == 23


@pytest.mark.parametrize(
    ("value", "weights"),
    [
        ("", None),
        (0.5, Weights((0.5,))),
        ("1, .5,,2", Weights((1, 0.5, 0, 2))),
        ([1, 2], Weights((1, 2))),
        ("sine", Weights(curve="sine")),
        (" sine + .25 ", Weights(curve="sine", base=0.25)),
    ],
)
def test_weights_are_read_from_lists_and_names(value, weights):
    assert parse_weights(value) == weights


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("down_lr_weight", "1,two", '"two" is not a number, nor one of cosine'),
        ("down_lr_weight", "sinus", '"sinus" is not a number, nor one of cosine'),
        ("up_lr_weight", "sine+much", '"much" is not a number'),
        ("mid_lr_weight", "sine", "must be a number"),
        ("block_dims", ",".join(["4"] * 24), "needs 25 numbers, one a block of the U-Net; 24 were given"),
        ("block_alphas", "1,2", "needs 25 numbers, one a block of the U-Net; 2 were given"),
        ("conv_block_dims", ",".join(["4"] * 26), "26 were given"),
        ("block_dims", "4,,4", '"" is not a number'),
        ("block_dims", "4,-1", "below 0"),
        ("block_dims", "4.5,1", "whole numbers"),
        ("conv_block_alphas", ",".join(["1"] * 25), "needs Conv dims (conv_block_dims)"),
    ],
)
def test_wrong_numbers_are_refused_saying_what_was_given(key, value, message):
    with pytest.raises(ConfigError) as caught:
        schema.parse({key: value})
    (problem,) = caught.value.problems
    assert problem.key == key
    assert message in problem.message


def test_sdxl_wants_23_numbers():
    schema.parse({"sdxl": True, "block_dims": ",".join(["4"] * 23)})
    with pytest.raises(ConfigError, match=r"needs 23 numbers.*25 were given"):
        schema.parse({"sdxl": True, "block_dims": ",".join(["4"] * 25)})


def sizes(tensors) -> dict[str, tuple[int, float]]:
    """Rank and alpha of every module in a file."""
    names = [key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")]
    return {n: (tensors[f"{n}.lora_down.weight"].shape[0], float(tensors[f"{n}.alpha"])) for n in names}


def sizes_by_block(path) -> dict[int | None, set[tuple[int, float]]]:
    found: dict[int | None, set[tuple[int, float]]] = {}
    for name, size in sizes(load_file(path)).items():
        found.setdefault(block_of(name), set()).add(size)
    return found


def listed(numbers) -> str:
    return ",".join(str(number) for number in numbers)


@pytest.mark.proves("block_dims", "block_alphas")
def test_block_dims_and_alphas_are_the_ranks_in_the_file_and_0_leaves_a_block_out(settings, train, tmp_path):
    ranks, alphas = [2 + i for i in range(25)], [0.5 + i for i in range(25)]
    ranks[16], alphas[17] = 0, 0
    change = {"block_dims": listed(ranks), "block_alphas": listed(alphas), "max_train_steps": 1}
    train(settings | change)
    found = sizes_by_block(tmp_path / "out" / "photo.safetensors")
    assert found == {None: {(4, 4)}, 1: {(3, 1.5)}, 12: {(14, 12.5)}, 17: {(19, 19)}}


@pytest.mark.proves("block_alphas")
def test_block_alphas_alone_keep_the_networks_rank(settings, train, tmp_path):
    train(settings | {"block_alphas": listed([2] * 25), "max_train_steps": 1})
    found = sizes_by_block(tmp_path / "out" / "photo.safetensors")
    assert found == {None: {(4, 4)}} | {block: {(4, 2)} for block in TINY_ATTENTION}


@pytest.mark.proves("conv_block_dims", "conv_block_alphas")
def test_conv_dims_turn_a_lora_into_a_locon_block_by_block(settings, train, tmp_path):
    conv = [1 + i for i in range(25)]
    conv[3] = 0
    train(settings | {"conv_dims": listed(conv), "conv_alphas": listed([0.5] * 25), "max_train_steps": 1})
    tensors = load_file(tmp_path / "out" / "photo.safetensors")
    convolutions = {
        name: size for name, size in sizes(tensors).items() if tensors[f"{name}.lora_down.weight"].shape[2:] == (3, 3)
    }
    assert {block_of(name) for name in convolutions} == TINY - {3}
    assert all(size == (conv[block_of(name)], 0.5) for name, size in convolutions.items())
    others = {name: size for name, size in sizes(tensors).items() if name not in convolutions}
    assert set(others.values()) == {(4, 4)}
    assert any(name.endswith("time_emb_proj") for name in others)


@pytest.mark.proves("block_lr_zero_threshold", "down_lr_weight", "up_lr_weight")
def test_blocks_not_above_the_threshold_get_no_modules(settings, train, tmp_path):
    weights = {"down_lr_weight": "0,0.1", "up_lr_weight": "1,1,1,0.3,0", "block_lr_zero_threshold": 0.1}
    train(settings | weights | {"max_train_steps": 1})
    assert set(sizes_by_block(tmp_path / "out" / "photo.safetensors")) == {None, 12, 16}


def session(settings, tmp_path, **change):
    return prepare(schema.parse({**settings, **change}), Run(tmp_path), lambda event: None)


def rates_by_block(s) -> dict[int | None, float]:
    return {group["block"]: group["lr"] for group in s.optimizer.param_groups if group["name"] == "unet"}


@pytest.mark.proves("down_lr_weight", "mid_lr_weight", "up_lr_weight")
def test_block_weights_multiply_the_unets_rate_in_groups_of_their_own(settings, tmp_path):
    s = session(
        settings,
        tmp_path,
        unet_lr=1e-3,
        text_encoder_lr=2e-4,
        lr_scheduler="constant",
        down_lr_weight="0,0.5",
        mid_lr_weight=0.25,
        up_lr_weight="reverse_linear",
    )
    expected = {1: 0.5e-3, 12: 0.25e-3, 16: 8 / 11 * 1e-3, 17: 7 / 11 * 1e-3}
    assert rates_by_block(s) == {block: pytest.approx(rate) for block, rate in expected.items()}
    for group in s.optimizer.param_groups:
        names = {n for n, m in s.network.layers.items() if any(p is q for p in m.parameters() for q in group["params"])}
        assert {block_of(name) for name in names} == {group["block"]}
    grouped = [p for group in s.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in s.network.parameters()}


def test_the_reported_rate_is_the_one_before_block_weights(settings, train):
    weights = {"down_lr_weight": "zeros+0.5", "mid_lr_weight": "0.1", "up_lr_weight": "zeros+0.3"}
    _, events, _ = train(settings | weights | {"unet_lr": 1e-3, "lr_scheduler": "linear", "max_train_steps": 2})
    rates = [event["unet_lr"] for event in events if event["type"] == "step"]
    assert rates == pytest.approx([1e-3, 0.5e-3])


@pytest.mark.proves("mid_lr_weight")
def test_a_block_with_a_tenth_of_the_rate_moves_a_tenth_as_far(settings, tmp_path):
    """SGD without momentum would move as far as rate × gradient; AdamW's first step moves by the rate itself."""
    from trainer import loop

    s = session(settings, tmp_path, lr_scheduler="constant", mid_lr_weight=0.1, optimizer_args="weight_decay=0")
    s.network.attach()
    before = {name: p.detach().clone() for name, p in s.network.named_parameters()}
    loop.take_step(s, 1, s.feed.batches(range(1)))
    s.network.detach()
    moved: dict[int | None, float] = {}
    for name, p in s.network.named_parameters():
        if name.endswith("lora_up.weight"):
            block = block_of(name.removeprefix("layers."))
            moved[block] = max(moved.get(block, 0.0), float((p.detach() - before[name]).abs().max()))
    assert moved[12] == pytest.approx(0.1 * moved[16], rel=0.05)
    assert moved[16] == pytest.approx(moved[1], rel=0.05)


def test_blocks_of_weight_0_keep_what_a_file_holds_there(settings, train, tmp_path):
    train(settings)
    (tmp_path / "out" / "photo.safetensors").rename(tmp_path / "given.safetensors")
    change = {"network_weights": str(tmp_path / "given.safetensors"), "dim_from_weights": True, "mid_lr_weight": 0}
    train(settings | change)
    old, new = load_file(tmp_path / "given.safetensors"), load_file(tmp_path / "out" / "photo.safetensors")
    changed = {block_of(k) for k in old if not torch.equal(old[k], new[k])}
    assert changed == {None, *TINY_ATTENTION} - {12}


def test_leaving_everything_out_is_refused(settings, train):
    nothing = {"down_lr_weight": "zeros", "mid_lr_weight": "0", "up_lr_weight": "zeros", "text_encoder_lr": 0}
    code, _, _ = train(settings | nothing)
    assert code == EXIT_CONFIG


def test_a_model_without_the_only_blocks_that_are_left_is_refused_by_the_controls(settings, train):
    """The tiny model has no attention in IN5, as the full one has."""
    code, events, _ = train(settings | {"block_dims": listed([4 * (i == 5) for i in range(25)]), "text_encoder_lr": 0})
    assert code == EXIT_CONFIG
    assert "block_dims" in events[-1]["message"]


def test_the_blocks_with_attention_are_those_of_the_full_models():
    for family in ("sd1", "sd2", "sdxl"):
        targets = full_model_targets(family).items()
        with_attention = {block_of(name) for name, target in targets if target.place == "attention"}
        assert with_attention - {None} == FAMILIES[family].blocks.attention


@pytest.mark.proves("LoRA_type", "conv_dim", "conv_alpha")
@pytest.mark.parametrize(
    "settings",
    [
        {"LoRA_type": "Kohya LoCon", "conv_dim": 4, "conv_alpha": 1},
        {"LoRA_type": "Kohya DyLoRA", "conv_dim": 4, "conv_alpha": 1, "unit": 4},
        {"LoRA_type": "LoRA-FA", "conv_block_dims": listed([4] * 25), "conv_block_alphas": listed([1] * 25)},
    ],
    ids=lambda settings: settings["LoRA_type"],
)
def test_a_locon_of_the_full_model_has_the_names_and_shapes_of_sd_scripts(settings):
    """All three of its modules write the same names."""
    expected = reference.read("sd15_locon_keys")["tensors"]
    config = schema.parse(settings)
    made = networks.build(
        config.network, full_model_targets(), {"unet", "text_encoder"}, from_settings(config, None)
    ).tensors()
    assert {k: list(t.shape) for k, t in made.items()} == {k: shape for k, (shape, _) in expected.items()}


def full_model_targets(family: str = "sd1") -> dict[str, Target]:
    from trainer.models import Schedule, sd

    row = FAMILIES[family]
    modules = sd.empty(row, row.configs)
    encoders = {encoder.key: modules[encoder.part] for encoder in row.encoders}
    schedule = Schedule.of(row.configs["scheduler"])
    cpu = torch.device("cpu")
    return sd.StableDiffusion(row, modules["unet"], None, encoders, schedule, torch.float32, cpu, 1, 75).targets()


@pytest.mark.proves("LoRA_type", "sdxl")
@pytest.mark.parametrize("type", ["Standard", "Kohya LoCon"])
def test_a_lora_of_the_full_sdxl_has_the_names_shapes_and_blocks_of_sd_scripts(type):
    """722 modules of the U-Net and 72 and 192 of the text encoders; 788 of the U-Net for LoCon."""
    theirs = reference.read("sdxl_modules")["modules"]
    expected = {name: row for name, row in theirs.items() if row[2] or type == "Kohya LoCon"}
    config = schema.parse({"sdxl": True, "LoRA_type": type, "conv_dim": 4, "conv_alpha": 1})
    targets = full_model_targets("sdxl")
    made = networks.build(config.network, targets, {"unet", "text_encoder"}, from_settings(config, None)).tensors()
    shapes = {n: [list(made[f"{n}.lora_{way}.weight"].shape) for way in ("down", "up")] for n in expected}
    assert {f"{n}.{key}" for n in expected for key in ("lora_down.weight", "lora_up.weight", "alpha")} == set(made)
    assert shapes == {name: [down, up] for name, (down, up, _, _) in expected.items()}
    assert {name: block_of(name) for name in expected} == {name: block for name, (*_, block) in expected.items()}


@pytest.mark.proves("LoRA_type", "conv_dim")
def test_a_locons_conv_rank_0_leaves_the_3x3_convolutions_alone(settings, train, tmp_path):
    locon = {"LoRA_type": "Kohya LoCon", "conv_dim": 0, "max_train_steps": 1}
    train(settings | locon)
    tensors = load_file(tmp_path / "out" / "photo.safetensors")
    assert not any(t.shape[2:] == (3, 3) for t in tensors.values())
    assert any("resnets_0_time_emb_proj" in name for name in tensors)


def test_training_goes_on_from_a_locon(settings, train, tmp_path):
    locon = settings | {"LoRA_type": "Kohya LoCon", "conv_dim": 2, "conv_alpha": 2}
    train(locon)
    (tmp_path / "out" / "photo.safetensors").rename(tmp_path / "given.safetensors")
    given = {"network_weights": str(tmp_path / "given.safetensors"), "learning_rate": 1e-9, "max_train_steps": 1}
    for change in ({**locon, **given}, {**settings, **given, "dim_from_weights": True}):
        train(change)
        old, new = load_file(tmp_path / "given.safetensors"), load_file(tmp_path / "out" / "photo.safetensors")
        assert old.keys() == new.keys()
        for name in old:
            torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-6)


def test_a_locon_file_is_refused_for_a_standard_lora_and_the_other_way_round(settings, train, tmp_path, capsys):
    for made, wanted, message in (
        ({"LoRA_type": "Kohya LoCon"}, {}, "is a LoCon"),
        ({}, {"LoRA_type": "Kohya LoCon"}, "has no 3×3 convolutions"),
        (
            {"LoRA_type": "Kohya LoCon", "conv_dim": 2},
            {"LoRA_type": "Kohya LoCon", "conv_dim": 3},
            "has rank 2 in 3×3 convolutions, Convolution Rank (conv_dim) is 3",
        ),
    ):
        train(settings | made | {"max_train_steps": 1})
        (tmp_path / "out" / "photo.safetensors").rename(tmp_path / "given.safetensors")
        code, _, _ = train(settings | wanted | {"network_weights": str(tmp_path / "given.safetensors")})
        assert code == EXIT_CONFIG
        assert message in capsys.readouterr().err
