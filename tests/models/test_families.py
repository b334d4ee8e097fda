"""What a model file is, told from its header."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from trainer.errors import ModelError
from trainer.models import families
from trainer.models.facts import FAMILIES
from trainer.models.families import Found, check_vae, detect, locate
from trainer.models.layout import tables

K = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
VAE = {
    "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
    "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
}
SD1_TEXT = {"cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,)}
SD1_CONFIGS = FAMILIES["sd1"].configs


def names(family):
    """A shape for every tensor of a full-size model."""
    family = FAMILIES[family]
    return {name: (1,) for table in tables(family, family.configs).values() for name in table}


SD1 = {**names("sd1"), FIRST: (8, 4, 3, 3), **VAE, **SD1_TEXT, K: (8, 768)}
SD2 = {**names("sd2"), FIRST: (8, 4, 3, 3), K: (8, 1024), **VAE}
XL_K = K.replace("1.1", "4.1")
SDXL = {**names("sdxl"), FIRST: (8, 4, 3, 3), XL_K: (8, 2048), **VAE}
LORA = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 768),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight": (8, 4),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.alpha": (),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (4, 768),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": (768, 4),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha": (),
}


@pytest.fixture
def model(tmp_path):
    def model(shapes, metadata=None):
        path = tmp_path / "model.safetensors"
        save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, path, metadata)
        return path

    return model


def refusal(function, *arguments):
    with pytest.raises(ModelError) as caught:
        function(*arguments)
    assert caught.value.hint or "of its path" in caught.value.message or "Windows" in caught.value.message
    return str(caught.value)


def test_sd1_is_told_by_its_text_encoder_and_width(model):
    found = detect(model(SD1))
    assert (found.family, found.prediction, found.layout, found.width) == ("sd1", "", "single file", 768)


@pytest.mark.parametrize(
    ("shapes", "family", "width", "title"),
    [(SD2, "sd2", 1024, "Stable Diffusion 2.x"), (SDXL, "sdxl", 2048, "SDXL")],
    ids=["SD 2.x", "SDXL"],
)
def test_sd2_and_sdxl_are_told_by_their_text_encoders(model, shapes, family, width, title):
    found = detect(model(shapes))
    assert (found.family, found.width, found.prediction, found.zero_terminal_snr) == (family, width, "", False)
    marked = detect(model(shapes | {"v_pred": (), "ztsnr": ()}))
    assert (marked.family, marked.prediction, marked.zero_terminal_snr) == (family, "v_prediction", True)
    assert (found.title, marked.title) == (title, f"{title}, v-prediction, zero terminal SNR")


def test_the_earliest_files_leave_a_part_of_the_text_encoders_names_out(model):
    old = {
        name.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."): shape
        for name, shape in SD1.items()
    }
    assert detect(model(old)).family == "sd1"


def test_the_tiny_model_is_sd1_by_the_configs_in_its_header(tiny_model):
    found = detect(tiny_model)
    assert (found.family, found.width) == ("sd1", 32)


@pytest.mark.parametrize(
    "metadata",
    [
        {"modelspec.prediction_type": "v"},
        {"config": json.dumps(SD1_CONFIGS | {"scheduler": {"prediction_type": "v_prediction"}})},
    ],
)
def test_velocity_prediction_is_read_where_the_file_says_so(model, metadata):
    assert detect(model(SD1, metadata)).prediction == "v_prediction"
    assert detect(model(SD1 | {"v_pred": ()})).prediction == "v_prediction"


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        (SD2 | {FIRST: (8, 9, 3, 3)}, "a Stable Diffusion 2.x model for inpainting"),
        (SDXL | {FIRST: (8, 8, 3, 3)}, "an SDXL model with 8 input channels instead of 4"),
        (
            {FIRST: (8, 4, 3, 3), **VAE, "conditioner.embedders.0.model.ln_final.weight": (1280,)},
            "is the SDXL refiner, which only finishes pictures",
        ),
        (SD1 | {FIRST: (8, 9, 3, 3)}, "for inpainting (9 input channels"),
        (SD1 | {FIRST: (8, 8, 3, 3)}, "8 input channels instead of 4"),
        ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.qkv.weight": (1,)}, "a Flux model"),
        (
            {FIRST: (8, 4, 3, 3), K: (8, 640), **VAE, "cond_stage_model.x": (1,)},
            "a U-Net of unknown kind (its text states are 640 wide)",
        ),
        (LORA, "is a LoRA, not a base model"),
        ({"unet.down_blocks.0.attn.to_k.lora_A.weight": (4, 8)}, "is a LoRA"),
        (VAE, "is a VAE, not a base model"),
        ({"decoder.conv_in.weight": (8, 4, 3, 3), "encoder.conv_in.weight": (8, 3, 3, 3)}, "is a VAE"),
        ({"conv_in.weight": (8, 4, 3, 3), "down_blocks.0.x": (1,)}, "is a U-Net without text encoder and VAE"),
        ({FIRST: (8, 4, 3, 3), K: (8, 768)}, "is a U-Net without text encoder and VAE"),
        ({"text_model.encoder.layers.0.x": (1,)}, "is a text encoder"),
        ({"control_model.x": (1,)}, "is a ControlNet"),
        ({"emb_params": (1, 768)}, "is a textual inversion embedding"),
        ({FIRST: (8, 4, 3, 3), K: (8, 768), **SD1_TEXT}, "lacks its VAE"),
        ({"classifier.weight": (3, 4)}, "those of no known base model (the first is classifier.weight)"),
        ({}, "its 0 tensors are those of no known base model"),
    ],
)
def test_other_files_are_refused_by_what_they_are(model, shapes, what):
    assert what in refusal(detect, model(shapes))


def test_a_config_in_the_header_that_is_of_no_use_is_damage(model):
    assert "is damaged" in refusal(detect, model(SD1, {"config": "{"}))
    for unet in (
        {},
        3,
        SD1_CONFIGS["unet"] | {"layers_per_block": 10**9},
        SD1_CONFIGS["unet"] | {"down_block_types": []},
    ):
        assert "is damaged" in refusal(detect, model(SD1, {"config": json.dumps(SD1_CONFIGS | {"unet": unet})}))


@pytest.mark.parametrize(
    ("name", "part"),
    [(K, "U-Net"), ("first_stage_model.quant_conv.bias", "VAE"), (next(iter(SD1_TEXT)), "text encoder")],
)
def test_a_missing_tensor_is_named_before_anything_is_loaded(model, name, part):
    shapes = {key: shape for key, shape in SD1.items() if key != name}
    # Without this key the width is still known from the others.
    shapes[K.replace("input_blocks.1", "input_blocks.2")] = (8, 768)
    message = refusal(detect, model(shapes))
    assert "lacks 1 of the" in message
    assert f"tensors of its {part}, the first is {name}" in message


def test_names_on_hugging_face_and_missing_paths():
    assert "huggingface.co" in refusal(locate, "runwayml/stable-diffusion-v1-5")
    assert "There is no file or folder" in refusal(locate, "/nowhere/model.safetensors")
    assert "Windows" in refusal(locate, r"C:\models\sd15.safetensors")


# Folders in diffusers' layout


@pytest.fixture
def folder(tmp_path):
    def folder(pipeline="StableDiffusionPipeline", weights=True, scheduler="epsilon", encoder=True, **unet):
        root = tmp_path / "model"
        unet = {"cross_attention_dim": 768, "in_channels": 4, "down_block_types": ["CrossAttnDownBlock2D"]} | unet
        parts = {"unet": unet, "vae": {"latent_channels": 4}} | (
            {"text_encoder": {"hidden_size": 768}} if encoder else {}
        )
        for part, config in parts.items():
            (root / part).mkdir(parents=True, exist_ok=True)
            (root / part / "config.json").write_text(json.dumps(config))
            if weights:
                name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
                save_file({"x": np.zeros(3, np.float16)}, root / part / f"{name}.safetensors")
        (root / "scheduler").mkdir(exist_ok=True)
        (root / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": scheduler}))
        (root / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
        return root

    return folder


def test_a_diffusers_folder_is_told_by_its_configs(folder):
    found = detect(folder(scheduler="v_prediction"))
    assert (found.family, found.prediction, found.layout, found.width) == ("sd1", "v_prediction", "diffusers", 768)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            {"pipeline": "StableDiffusionXLImg2ImgPipeline", "addition_embed_type": "text_time", "encoder": False},
            "the SDXL refiner",
        ),
        ({"pipeline": "StableDiffusion3Pipeline"}, "Stable Diffusion 3"),
        ({"pipeline": "FluxPipeline"}, "a Flux model"),
        ({"in_channels": 9}, "for inpainting (9"),
        ({"pipeline": "DDPMPipeline", "down_block_types": ["DownBlock2D"]}, "of the kind DDPMPipeline"),
        ({"weights": False}, "holds no .safetensors weights"),
    ],
)
def test_other_folders_are_refused_by_what_they_are(folder, change, what):
    assert what in refusal(detect, folder(**change))


def test_an_incomplete_or_damaged_folder_names_the_file(folder):
    root = folder()
    weights = root / "unet" / "diffusion_pytorch_model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-2])
    assert f'"{weights}" is cut off' in refusal(detect, root)
    weights.unlink()
    (root / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    assert "is a pickle" in refusal(detect, root)
    weights.write_bytes(sound)
    (root / "vae" / "config.json").write_text("{")
    assert "is not JSON" in refusal(detect, root)
    (root / "vae" / "config.json").unlink()
    assert "is incomplete" in refusal(detect, root)


def test_a_part_of_a_model_and_a_folder_around_one_name_the_right_path(folder):
    root = folder()
    assert f'"{root}"' in refusal(detect, root / "vae")
    assert f'"{root}"' in refusal(detect, root.parent)


# VAE and LoRA


def test_a_vae_may_be_bare_inside_a_checkpoint_or_a_folder(model, folder):
    check_vae(str(model(SD1)))
    check_vae(str(model({"decoder.conv_in.weight": (8, 4, 3, 3)})))
    check_vae(str(folder()))
    check_vae(str(folder() / "vae"))


def test_what_is_no_vae_of_stable_diffusion_is_refused(model, folder):
    assert "is a LoRA, not a VAE" in refusal(check_vae, str(model(LORA)))
    assert "16 latent channels" in refusal(check_vae, str(model({"decoder.conv_in.weight": (8, 16, 3, 3)})))
    base = Found("sd1", "epsilon", "single file", "a model", 768, vae_channels=512)
    path = model({"decoder.conv_in.weight": (8, 4, 3, 3)})
    with pytest.raises(ModelError, match="8 channels instead of 512"):
        check_vae(str(path), base)
    assert "is not the folder of a VAE" in refusal(check_vae, str(folder() / "unet"))
    assert "There is no file or folder" in refusal(check_vae, "/nowhere/vae.safetensors")


def test_families_are_told_without_torch():
    code = "import sys, trainer.models.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_family_is_named_in_its_row_alone_besides_what_tells_files_apart_and_its_switch():
    root = Path(families.__file__).parents[1]
    named = {
        file.relative_to(root).as_posix()
        for file in root.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in FAMILIES
    }
    assert named == {"models/facts.py", "lora/recognise.py", "schema/model.py", "demo/make_base.py"}
