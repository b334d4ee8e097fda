"""Every naming is read as what it means; what cannot be is refused with the reason."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests import reference
from tests.lora.conftest import KOHYA, SDXL_UNET, adapted_unet, cloneofsimo, delta, pair, plain
from trainer.errors import ModelError
from trainer.lora.names import Layer, from_original, kohya, layer, to_original
from trainer.lora.programs import PROGRAMS, layers_of
from trainer.lora.reading import read
from trainer.lora.recognise import recognise
from trainer.models import layout


def updates(file) -> dict[str, torch.Tensor]:
    """Kohya's name of each layer → alpha/rank · up · down."""
    found = {}
    for name in file.about.layers:
        down, up = file.tensors[f"{name}.lora_down.weight"], file.tensors[f"{name}.lora_up.weight"]
        found[name] = float(file.tensors[f"{name}.alpha"]) / len(down) * (up.flatten(1) @ down.flatten(1))
    return found


def test_kohyas_file_is_read_as_it_is(write):
    tensors = plain()
    file = read(write(tensors, {"ss_steps": "3"}))
    assert (file.about.naming, file.about.family, file.about.type) == ("kohya", "sd1", "")
    assert file.tensors.keys() == tensors.keys() and all(torch.equal(file.tensors[n], t) for n, t in tensors.items())
    assert file.metadata == {"ss_steps": "3"}
    assert (file.about.parts, file.about.ranks, file.about.modules) == ({"unet", "text_encoder"}, {4}, 2)


@pytest.mark.parametrize("alpha", [4, 2])
def test_a_file_of_diffusers_means_what_it_means_in_diffusers(tmp_path, alpha):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    unet = adapted_unet(alpha, {"conv1": 8} if alpha == 2 else None)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    settings = unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, state, unet_lora_adapter_metadata=settings if alpha == 2 else None
    )
    file = read(tmp_path / "pytorch_lora_weights.safetensors")
    expected = {
        kohya(Layer("unet", name), "sd1"): delta(module).flatten(1)
        for name, module in unet.named_modules()
        if hasattr(module, "lora_A")
    }
    found = updates(file)
    assert found.keys() == expected.keys()
    for name, update in found.items():
        assert torch.allclose(update, expected[name], atol=1e-6), name


def test_a_file_of_peft_takes_alpha_from_the_settings_beside_it(tmp_path):
    from peft import LoraConfig, get_peft_model

    unet = torch.nn.ModuleDict(
        {
            "mid_block": torch.nn.ModuleDict(
                {"attentions": torch.nn.ModuleList([torch.nn.ModuleDict({"proj_in": torch.nn.Linear(6, 5)})])}
            )
        }
    )
    model = get_peft_model(unet, LoraConfig(r=2, lora_alpha=6, use_rslora=True, target_modules=["proj_in"]))
    layer = model.base_model.model["mid_block"]["attentions"][0]["proj_in"]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    model.save_pretrained(tmp_path)
    file = read(tmp_path / "adapter_model.safetensors")
    assert file.about.naming == "PEFT"
    assert torch.allclose(updates(file)["lora_unet_mid_block_attentions_0_proj_in"], delta(layer), atol=1e-6)


@pytest.mark.parametrize(
    "settings", ["{broken", "[1]", '{"unet.lora_alpha": "much"}', '{"unet.alpha_pattern": {"(": 1}}']
)
def test_settings_of_an_adapter_that_are_none_are_refused(write, settings):
    names = ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "unet.mid_block.attentions.0.proj_in.lora_B.weight")
    tensors = dict(zip(names, (torch.ones(2, 6), torch.ones(5, 2)), strict=True))
    with pytest.raises(ModelError, match="adapter's settings cannot be read"):
        read(write(tensors, {"lora_adapter_metadata": settings}))


OLDER = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
    "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_q_lora": "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q",
    "unet.up_blocks.1.resnets.0.conv_shortcut.lora": "lora_unet_up_blocks_1_resnets_0_conv_shortcut",
    "text_encoder.text_model.encoder.layers.1.self_attn.out_proj.lora_linear_layer": "lora_te_text_model_encoder_layers_1_self_attn_out_proj",
    "text_encoder.text_model.encoder.layers.1.self_attn.to_k_lora": "lora_te_text_model_encoder_layers_1_self_attn_k_proj",
    "text_encoder.encoder.layers.1.mlp.fc1.lora": "lora_te_text_model_encoder_layers_1_mlp_fc1",
}


@pytest.mark.parametrize(("theirs", "ours"), OLDER.items())
def test_older_spellings_of_diffusers_are_known(write, theirs, ours):
    file = read(write({f"{theirs}.down.weight": torch.ones(2, 6), f"{theirs}.up.weight": torch.ones(6, 2)}))
    assert file.tensors.keys() == {f"{ours}.lora_down.weight", f"{ours}.lora_up.weight", f"{ours}.alpha"}
    assert float(file.tensors[f"{ours}.alpha"]) == 2
    assert "rank" in file.about.notes[0]


def test_cloneofsimos_pairs_are_told_by_their_order(write):
    tensors, metadata = cloneofsimo()
    file = read(write(tensors | {"<new>": torch.ones(768)}, metadata | {"<new>": "<embed>"}))
    name = "lora_te_text_model_encoder_layers_1_self_attn_{}_proj.lora_up.weight"
    for i, projection in enumerate(("k", "v", "q", "out")):
        assert torch.equal(file.tensors[name.format(projection)], tensors[f"text_encoder:{4 + i}:up"])
    assert "<new>" in " ".join(file.about.notes)
    assert {float(t) for n, t in file.tensors.items() if n.endswith("alpha")} == {4.0}


def test_cloneofsimos_unet_ends_with_its_middle(write):
    from trainer.lora.cloneofsimo import _unet_layers

    for last in (False, True):
        layers = list(_unet_layers(last))
        tensors = {}
        for i, name in enumerate(layers):
            out = 80 if name.endswith("proj") else 10
            tensors |= {f"unet:{i}:up": torch.zeros(out, 1), f"unet:{i}:down": torch.zeros(1, 10)}
        lora = recognise(write(tensors, {"unet": '["CrossAttention", "Attention", "GEGLU"]'}))
        wide = [n for n, t in lora.tensors.items() if t.shape == (80, 1)]
        assert len(wide) == 16 and all("_ff_net_0_proj." in name for name in wide)
        assert lora.names["unet:143:up"].startswith("lora_unet_mid_block_attentions_0_")


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (32, "")])
def test_the_width_of_the_text_states_tells_the_family(write, width, family):
    lora = recognise(write(pair(KOHYA, wide=width)))
    assert (lora.family, lora.width) == (family, width)


def test_sdxl_is_named_as_sd_scripts_names_it_whatever_the_file_says(write):
    lora = recognise(
        write(
            {
                "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k.lora_A.weight": torch.ones(4, 2048),
                "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k.lora_B.weight": torch.ones(640, 4),
                "text_encoder_2.text_model.encoder.layers.31.mlp.fc2.lora_A.weight": torch.ones(4, 5120),
                "text_encoder_2.text_model.encoder.layers.31.mlp.fc2.lora_B.weight": torch.ones(1280, 4),
            }
        )
    )
    assert lora.family == "sdxl"
    assert set(lora.layers) == {
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k",
        "lora_te2_text_model_encoder_layers_31_mlp_fc2",
    }


@pytest.mark.parametrize(
    ("tensors", "type"),
    [
        ({"hada_w1_a": (8, 4), "hada_w1_b": (4, 8), "hada_w2_a": (8, 4), "hada_w2_b": (4, 8), "alpha": ()}, "LyCORIS/LoHa"),
        ({"lokr_w1": (4, 8), "lokr_w2": (2, 2), "alpha": ()}, "LyCORIS/LoKr"),
        ({"oft_blocks": (4, 8, 8), "alpha": ()}, "LyCORIS/Diag-OFT"),
        ({"oft_blocks": (2, 4, 8, 8), "alpha": ()}, "LyCORIS/BOFT"),
        ({"a1.weight": (4, 8), "a2.weight": (8, 4), "b1.weight": (4, 8), "b2.weight": (8, 4), "alpha": ()}, "LyCORIS/GLoRA"),
        ({"weight": (8, 1), "on_input": ()}, "LyCORIS/iA3"),
        ({"diff": (8, 8), "diff_b": (8,)}, "LyCORIS/Native Fine-Tuning"),
        ({"lora_up.weight": (8, 4), "lora_down.weight": (4, 8), "alpha": (), "dora_scale": (8, 1)}, "LyCORIS/LoCon"),
        ({"lora_up.weight": (8, 4), "lora_down.weight": (4, 8), "alpha": ()}, ""),
    ],
)  # fmt: skip
def test_the_type_is_told_by_the_tensors(write, tensors, type):
    assert recognise(write({f"{KOHYA}.{role}": torch.ones(shape) for role, shape in tensors.items()})).type == type


def test_the_ranks_of_convolutions_are_told_apart(write):
    conv = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {
        f"{conv}.lora_down.weight": torch.ones(2, 8, 3, 3),
        f"{conv}.lora_up.weight": torch.ones(8, 2, 1, 1),
        f"{conv}.alpha": torch.tensor(1.0),
    }
    lora = recognise(write(plain() | tensors))
    assert (lora.ranks, lora.conv_ranks) == ({4}, {2})


MALFORMED = {
    "a doubled prefix": (lambda: pair("lora_unet_unet_down_blocks_0_attentions_0_proj_in"), "its prefix twice"),
    "no alpha": (lambda: pair(KOHYA, alpha=None), "has no alpha"),
    "half a pair": (lambda: {f"{KOHYA}.lora_up.weight": torch.ones(8, 4)}, "lacks"),
    "ranks that differ": (lambda: pair(KOHYA) | {f"{KOHYA}.lora_up.weight": torch.ones(320, 8)}, "share no rank"),
    "alpha of many": (lambda: pair(KOHYA) | {f"{KOHYA}.alpha": torch.ones(3)}, "instead of being one number"),
    "a layer of nowhere": (lambda: pair("lora_unet_down_blocks_0_wings_0_to_q"), "no such layer"),
    "a role of nowhere": (lambda: pair(KOHYA) | {f"{KOHYA}.lora_sideways": torch.ones(3)}, "no LoRA type"),
    "two families": (lambda: plain() | pair("lora_te1_text_model_encoder_layers_0_mlp_fc1"), "mixes model families"),
    "an SD U-Net with SDXL's text encoder": (
        lambda: pair(KOHYA) | pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        "mixes model families",
    ),
    "one tensor twice": (
        lambda: pair("lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k") | pair(KOHYA),
        "are the same tensor",
    ),
    "a transformer's": (lambda: pair("lora_unet_double_blocks_0_img_attn_proj"), "Flux"),
    "not a LoRA": (lambda: {"classifier.weight": torch.ones(3, 4)}, "not a LoRA"),
    "a VAE": (lambda: {"decoder.conv_in.weight": torch.ones(3, 4, 3, 3)}, "a VAE"),
}  # fmt: skip


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_file_is_refused_with_the_reason(write, what):
    tensors, why = MALFORMED[what]
    with pytest.raises(ModelError) as error:
        read(write(tensors()))
    assert why in error.value.message and error.value.hint


def test_a_file_that_was_cut_off_is_refused(write):
    path = write(plain())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cut off"):
        read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelError, match="no file"):
        read(tmp_path / "gone.safetensors")


def test_every_layer_of_a_real_file_has_a_name_in_every_naming():
    keys = reference.read("sd15_locon_keys")["tensors"]
    for name in {key.split(".")[0] for key in keys}:
        found = layer(name)
        assert found and kohya(found, "sd1") == name
        if found.part == "unet":
            assert from_original(to_original(found.path, "up_blocks.0" not in found.path)) == found.path


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_the_layers_that_sd_scripts_trains_are_known_to_us_and_every_program(family):
    names = reference.read("lora_names")["sdxl" if family == "sdxl" else "sd2 text encoder"]
    assert {"sdxl": 1052, "sd2": 138}[family] == len(names)
    assert set(names) <= layers_of(family)
    for name in names:
        assert kohya(layer(name), family) == name
        assert all(program._finds(name, family) for program in PROGRAMS), name


def test_the_original_names_are_those_of_the_checkpoints():
    for theirs, ours in layout.unet_names(SDXL_UNET).items():
        theirs, ours = (name.removeprefix(layout.UNET_PREFIX).rpartition(".")[0] for name in (theirs, ours))
        assert from_original(theirs) == ours and to_original(ours) == theirs


def test_files_are_told_without_torch():
    code = "import sys, trainer.lora.recognise; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
