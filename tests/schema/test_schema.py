from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import schema
from trainer.errors import ConfigError
from trainer.models.facts import FAMILIES
from trainer.schema import PARAMETERS
from trainer.schema.table import markdown

ROOT = Path(__file__).parent.parent.parent
TRAINER = ROOT / "trainer"


def test_every_field_is_read_somewhere_in_the_trainer():
    """No control is dead: outside the schema, each field is read off its group or off `settings`."""
    read = set()
    for path in TRAINER.rglob("*.py"):
        if path.parent.name != "schema" or path.name == "rules.py":
            text = path.read_text()
            read |= {
                (owner_of(node.value), node.attr)
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.Attribute)
            }
            read |= {("by key", key) for key in PARAMETERS if f'"{key}"' in text and path.name == "check.py"}
    # Picking a model fills its path; the switches of families are read by the names in their rows.
    read_otherwise = {"model_list", *(family.switch for family in FAMILIES.values())}
    dead = [
        p.key
        for p in PARAMETERS.values()
        if not {(p.group, p.name), ("settings", p.name), ("by key", p.key)} & read and p.key not in read_otherwise
    ]
    assert dead == []


def owner_of(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def test_every_parameter_has_help_a_label_and_a_valid_default():
    for parameter in PARAMETERS.values():
        assert len(parameter.help) > 40, parameter.key
        assert parameter.label
        assert parameter.help.endswith((".", "”")), parameter.key
    config = schema.parse(schema.defaults())
    assert config.optim.learning_rate == 1e-4


def test_messages_call_every_control_by_the_label_that_it_has_in_the_form():
    """A control is named as "Label (key)"; a label's own brackets may be left out."""
    labels = {key: {p.label, re.sub(r" \(.*\)$", "", p.label)} for key, p in PARAMETERS.items()}
    wrong = [
        (path.name, node.value[max(0, found.start() - 40) : found.end()])
        for path in TRAINER.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for found in re.finditer(r" \((\w+)\)", node.value)
        if found[1] in labels
        and (before := node.value[: found.start()])
        and not before.endswith(tuple(labels[found[1]]))
    ]
    assert wrong == []


def test_every_condition_names_a_parameter_and_values_it_can_have():
    for parameter in PARAMETERS.values():
        for other, values in parameter.when.items():
            driver = PARAMETERS[other]
            allowed = {True, False} if driver.kind == "switch" else set(driver.choices)
            assert set(values) <= allowed, parameter.key


def test_the_trainer_never_imports_the_page_and_the_schema_never_imports_torch():
    for path in TRAINER.rglob("*.py"):
        modules = [a.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import) for a in n.names]
        modules += [n.module or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        assert not {m.split(".")[0] for m in modules} & {"gui", "gradio", "app"}, path
    light = "import trainer.schema, trainer.kohya, trainer.events, trainer.run, trainer.check, trainer.start, sys"
    heavy = "print(sorted({'torch', 'diffusers', 'transformers', 'accelerate', 'gradio'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", f"{light}; {heavy}"], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr


def test_a_plain_lora_imports_no_library_of_other_types_or_optimizers():
    check = "import trainer.loop, trainer.models.sd, trainer.networks.standard, sys"
    found = "print(sorted({'lycoris', 'wandb', 'tensorboard', 'pytorch_optimizer', 'dadaptation'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", f"{check}; {found}"], cwd=ROOT, capture_output=True, text=True)
    assert answer.stdout.strip() == "[]", answer.stderr


@pytest.mark.parametrize("before", ["", "import diffusers.optimization; "])
def test_a_start_imports_the_models_that_are_trained_and_later_all_others_are_to_be_had(before):
    code = before + (
        "import trainer.loop, trainer.models.sd, trainer.models.lean_imports as lean, sys\n"
        "others = {'bitsandbytes', 'torch._inductor.compile_fx', 'diffusers.models.transformers.transformer_flux'}\n"
        "print(sorted(others & set(sys.modules)))\n"
        "from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel\n"
        "from transformers import BlipConfig, CLIPTextModel\n"
        "import bitsandbytes\n"
        "print(AutoencoderKL is lean.AutoencoderKL, UNet2DConditionModel is lean.UNet2DConditionModel,"
        " CLIPTextModel is lean.CLIPTextModel)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert ran.stdout.splitlines() == ["[]", "True True True"]


def test_a_library_that_cannot_be_imported_is_told_as_such():
    code = "import sys; sys.modules['transformers'] = None; import trainer.models.lean_imports"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert "import of transformers halted" in ran.stderr.splitlines()[-1]


def test_the_page_imports_of_the_trainer_only_what_needs_no_torch():
    code = (
        "import importlib, pkgutil, sys, gui\n"
        "for found in pkgutil.iter_modules(gui.__path__): importlib.import_module('gui.' + found.name)\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert ran.stdout.strip().splitlines()[-1] == "[]"


def test_the_table_in_the_docs_is_the_schemas():
    assert (ROOT / "docs" / "parameters.md").read_text() == markdown(), (
        "run: python -m trainer parameters > docs/parameters.md"
    )


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train_batch_size", "8", 8),
        ("train_batch_size", 8.0, 8),
        ("train_batch_size", "8.0", 8),
        ("learning_rate", "1e-4", 1e-4),
        ("cache_latents", "0", False),
        ("cache_latents", 1.0, True),
        ("cache_latents", "true", True),
        ("max_grad_norm", 0, 0.0),
        ("max_grad_norm", "0", 0.0),
        ("seed", "", None),
        ("seed", None, None),
        ("text_encoder_lr", "", None),
        ("text_encoder_lr", 0, 0.0),
        ("caption_extension", "", ""),
        ("max_resolution", "512,768", (512, 768)),
        ("max_resolution", 512, (512, 512)),
        ("max_token_length", "225", 225),
        ("optimizer_args", '"weight_decay=0.1" "betas=0.9,0.99"', {"weight_decay": 0.1, "betas": (0.9, 0.99)}),
        ("optimizer_args", "", {}),
    ],
)
def test_values_of_any_json_type_are_coerced(key, value, expected):
    parameter = PARAMETERS[key]
    config = schema.parse({key: value})
    assert getattr(getattr(config, parameter.group), parameter.name) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_batch_size", "two"),
        ("train_batch_size", 0),
        ("train_batch_size", 1.5),
        ("learning_rate", "NaN"),
        ("learning_rate", "-1"),
        ("learning_rate", "1e999"),
        ("cache_latents", "maybe"),
        ("lr_scheduler", "warmdown"),
        ("max_resolution", "wide"),
        ("optimizer_args", "weight_decay"),
        ("optimizer_args", '"weight_decay=0.1'),
        ("network_dim", "0"),
        ("network_dim", [1, 2]),
        ("output_name", "a/b"),
        ("output_name", "a\nb"),
        ("output_name", "ü" * 101),
    ],
)
def test_a_bad_value_is_refused_naming_the_control_and_the_value(key, value):
    with pytest.raises(ConfigError) as caught:
        schema.parse({key: value})
    (problem,) = caught.value.problems
    assert problem.key == key
    assert problem.label == PARAMETERS[key].label
    assert str(value)[:8] in problem.message


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        schema.parse({"train_batch_size": 0, "learning_rate": "x", "lr_scheduler": "y", "nonsense": 1})
    assert {p.key for p in caught.value.problems} == {"train_batch_size", "learning_rate", "lr_scheduler", "nonsense"}


@pytest.mark.parametrize(
    ("values", "both"),
    [
        ({"dim_from_weights": True}, ("dim_from_weights", "network_weights")),
        ({"unet_lr": 0, "text_encoder_lr": 0}, ("unet_lr", "text_encoder_lr")),
        ({"learning_rate": 0, "unet_lr": "", "text_encoder_lr": ""}, ("unet_lr", "text_encoder_lr")),
        ({"lr_scheduler": "adafactor", "optimizer": "AdamW"}, ("lr_scheduler", "AdamW")),
        ({"network_dim": 5000}, ("network_dim", "LoRA_type")),
        ({"cache_latents": False, "cache_latents_to_disk": True}, ("cache_latents_to_disk", "Cache latents")),
        (
            {"min_bucket_reso": 512, "max_bucket_reso": 256, "bucket_no_upscale": False},
            ("min_bucket_reso", "Maximum bucket"),
        ),
        ({"unet_lr": 0, "stop_text_encoder_training": 50}, ("stop_text_encoder_training", "unet_lr")),
        (
            {
                "sdxl": True,
                "text_encoder_lr": 0,
                "down_lr_weight": "zeros",
                "mid_lr_weight": "0,0,0",
                "up_lr_weight": "zeros",
            },
            ("up_lr_weight", "text_encoder_lr"),
        ),
        ({"text_encoder_lr": 0, "block_dims": "0," * 24 + "0"}, ("block_dims", "text_encoder_lr")),
        (
            {
                "stop_text_encoder_training": 50,
                "down_lr_weight": "zeros",
                "mid_lr_weight": 0,
                "up_lr_weight": "1,1,1,0,0,0,0,0,0,0,0,0",
            },
            ("up_lr_weight", "stop_text_encoder_training"),
        ),
        ({"cache_latents": True, "color_aug": True}, ("color_aug", "Cache latents")),
        ({"cache_latents": True, "random_crop": True}, ("random_crop", "Cache latents")),
    ],
)
def test_a_combination_that_cannot_work_is_refused_naming_both_controls(values, both):
    with pytest.raises(ConfigError) as caught:
        schema.parse(values)
    assert all(name in str(caught.value) for name in both)


@pytest.mark.parametrize(
    "values",
    [
        {"min_bucket_reso": 1088},
        {"min_bucket_reso": 1088, "enable_bucket": False, "bucket_no_upscale": False},
        {"dim_from_weights": True, "network_weights": "a.safetensors", "block_dims": "1,2", "conv_block_alphas": "1"},
        {"unet_lr": 0, "stop_text_encoder_training": 100},
        {"text_encoder_lr": 0, "mid_lr_weight": 0, "up_lr_weight": "zeros", "down_lr_weight": "0,1,0"},
        {"text_encoder_lr": 0, "block_dims": "0," * 24 + "0", "conv_block_dims": "0," * 24 + "4"},
    ],
)
def test_what_does_not_apply_is_in_nobodys_way(values):
    schema.parse(values)


def test_settings_cannot_be_changed_once_they_are_parsed():
    config = schema.parse({})
    with pytest.raises(ValueError, match="frozen"):
        config.training.batch_size = 3


def test_defaults_are_json():
    assert json.loads(json.dumps(schema.defaults())) == schema.defaults()


def test_every_parameter_has_a_test_that_says_it_proves_its_effect():
    proved = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                marks = [
                    d for d in node.decorator_list if isinstance(d, ast.Call) and ast.unparse(d.func).endswith("proves")
                ]
                proved |= {argument.value for mark in marks for argument in mark.args}
    assert set(PARAMETERS) - proved == set()
    assert proved - set(PARAMETERS) == set()
