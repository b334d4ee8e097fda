"""Whether a LoRA file is what it should be, and which programs load it: read back from the disk and proved."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from trainer.checkpoint import DTYPES, as_stored, hashes
from trainer.errors import LorawrightError
from trainer.events import Verified
from trainer.lora.programs import loading, of_usual_size, strangers
from trainer.lora.reading import LoraFile, read
from trainer.lora.recognise import by_layer
from trainer.models.facts import FAMILIES
from trainer.models.families import TITLES

# What sd-scripts writes into every file of a training, and readers rely on.
REQUIRED = [
    "ss_session_id",
    "ss_training_started_at",
    "ss_training_finished_at",
    "ss_output_name",
    "ss_learning_rate",
    "ss_unet_lr",
    "ss_text_encoder_lr",
    "ss_num_train_images",
    "ss_num_reg_images",
    "ss_num_batches_per_epoch",
    "ss_num_epochs",
    "ss_max_train_steps",
    "ss_steps",
    "ss_epoch",
    "ss_gradient_checkpointing",
    "ss_gradient_accumulation_steps",
    "ss_lr_warmup_steps",
    "ss_lr_scheduler",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_mixed_precision",
    "ss_full_fp16",
    "ss_v2",
    "ss_base_model_version",
    "ss_clip_skip",
    "ss_max_token_length",
    "ss_cache_latents",
    "ss_seed",
    "ss_noise_offset",
    "ss_training_comment",
    "ss_optimizer",
    "ss_max_grad_norm",
    "ss_caption_dropout_rate",
    "ss_prior_loss_weight",
    "ss_min_snr_gamma",
    "ss_batch_size_per_device",
    "ss_total_batch_size",
    "ss_resolution",
    "ss_color_aug",
    "ss_flip_aug",
    "ss_random_crop",
    "ss_shuffle_caption",
    "ss_keep_tokens",
    "ss_enable_bucket",
    "ss_bucket_no_upscale",
    "ss_min_bucket_reso",
    "ss_max_bucket_reso",
    "ss_bucket_info",
    "ss_tag_frequency",
    "ss_dataset_dirs",
    "ss_reg_dataset_dirs",
    "ss_sd_model_name",
    "sshs_model_hash",
    "sshs_legacy_hash",
    "modelspec.sai_model_spec",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.title",
    "modelspec.resolution",
    "modelspec.date",
]
JSON = ("ss_bucket_info", "ss_tag_frequency", "ss_dataset_dirs", "ss_reg_dataset_dirs")
# ΔW is a sum of such products, by the tensors of a layer; it is nothing while each has a factor of zeros.
PRODUCTS = (
    (("lora_up.weight",), ("lora_down.weight",)),
    (("hada_w1_a",), ("hada_w1_b",), ("hada_w2_a",), ("hada_w2_b",)),
    (("lokr_w1", "lokr_w1_a"), ("lokr_w1", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a"), ("lokr_w2", "lokr_w2_b")),
    (("a1.weight",), ("a2.weight",)),
    (("b1.weight",), ("b2.weight",)),
    *(((role,),) for role in ("oft_blocks", "diff", "diff_b", "w_norm", "b_norm")),
)


@dataclass(frozen=True)
class Expected:
    """What a training's own file must hold: its tensors as trained, cast to `precision`, from a model of `family`."""

    tensors: Mapping[str, torch.Tensor]
    precision: str
    family: str
    step: int


def verify(path: Path | str, expected: Expected | None = None) -> Verified:
    """Read the file back and prove it; of any naming and program. Nothing is raised for what is wrong with it.

    Proved are: every tensor belongs to a layer that models of its family have and to a known type;
    shapes fit each other; all numbers are finite, and not all nothing; the metadata is complete and
    its hashes are those of the content; and, of a training's own file, that it holds bit for bit what
    was trained, in the precision asked for.
    """
    path = Path(path)
    try:
        file = read(path)
    except LorawrightError as error:
        return Verified(str(path), problems=(str(error),))
    findings = _Findings()
    findings.add(
        f"{len(file.about.tensors)} tensors of {file.about.modules} layers, each known by name and shape", _names(file)
    )
    findings.add("all numbers are finite", _finite(file))
    _zeros(file, findings, expected.step if expected else None)
    if expected:
        findings.add(
            f"the file holds what was trained, bit for bit in {expected.precision}", _as_trained(file, expected)
        )
    _metadata(file, findings, is_own=expected is not None)
    findings.warnings += file.about.notes
    if not of_usual_size(file.about):
        findings.warnings.append(
            f"Its base model's text states are {file.about.width} wide, as in no model that most programs know."
        )
    loads_in, passed_over = loading(file.about)
    if findings.problems:
        loads_in = ()
    return Verified(
        str(path), tuple(findings.checks), tuple(findings.problems), tuple(findings.warnings), loads_in, passed_over
    )


@dataclass
class _Findings:
    checks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, check: str, problem: str) -> None:
        """A check that was made, under what is wrong if something is."""
        if problem:
            self.problems.append(problem)
        else:
            self.checks.append(check)


def _names(file: LoraFile) -> str:
    unknown = strangers(file.about)
    if not unknown:
        return ""
    family = FAMILIES.get(file.about.family)
    title = family.title if family else TITLES
    return f"{len(unknown)} of {file.about.modules} layers are not in a model of {title} (the first: {unknown[0]})."


def _finite(file: LoraFile) -> str:
    bad = [name for name, tensor in file.tensors.items() if not torch.isfinite(tensor).all()]
    return f"{len(bad)} of {len(file.tensors)} tensors are not numbers (the first: {bad[0]})." if bad else ""


def _zeros(file: LoraFile, findings: _Findings, step: int | None) -> None:
    """Whether the LoRA changes anything; that it does not is right before the first step alone."""
    layers = by_layer(file.tensors)
    idle = [name for name, roles in layers.items() if _is_nothing(roles)]
    if len(idle) < len(layers):
        findings.checks.append(f"{len(layers) - len(idle)} of {len(layers)} layers change the model")
        return
    message = "The LoRA changes nothing: in every layer a factor of the update is all zeros"
    if step == 0:
        findings.warnings.append(f"{message}, as it is before the first step.")
    else:
        findings.problems.append(f"{message}. Was the learning rate 0, or too small for the file's precision?")


def _is_nothing(roles: Mapping[str, torch.Tensor]) -> bool:
    if "dora_scale" in roles or "on_input" in roles:
        return "on_input" in roles and not roles["weight"].any()
    products = [product for product in PRODUCTS if any(role in roles for choice in product for role in choice)]
    return all(
        any(not roles[role].any() for choice in product for role in choice if role in roles) for product in products
    )


def _as_trained(file: LoraFile, expected: Expected) -> str:
    if odd := sorted(set(file.tensors) ^ set(expected.tensors)):
        return f"{len(odd)} tensors were trained and are not in the file, or the reverse (the first: {odd[0]})."
    for name, trained in as_stored(expected.tensors, DTYPES[expected.precision]).items():
        if file.tensors[name].dtype != trained.dtype:
            return f"{name} is {file.tensors[name].dtype}, not {trained.dtype} as was asked for."
        if not torch.equal(file.tensors[name], trained):
            return f"{name} is not what was trained: the disk or its connection alters what is written."
    found = file.about.family
    if found and expected.family and found != expected.family:
        return f"It would be taken for {FAMILIES[found].title}, and is for {FAMILIES[expected.family].title}."
    return ""


def _metadata(file: LoraFile, findings: _Findings, is_own: bool) -> None:
    metadata = file.metadata
    told: Callable[[str], None] = findings.problems.append if is_own else findings.warnings.append
    missing = [key for key in REQUIRED if key not in metadata]
    broken = [key for key in JSON if key in metadata and not _is_json(metadata[key])]
    if not any(key.startswith("ss_") for key in metadata):
        told("The file says nothing about its training (no ss_ entries).")
    elif missing:
        told(f"The metadata lacks {len(missing)} of {len(REQUIRED)} entries (the first: {missing[0]}).")
    elif not broken:
        findings.checks.append(f"the metadata has all of {len(REQUIRED)} entries that sd-scripts writes")
    if broken:
        findings.problems.append(f"The metadata entry {broken[0]} is not JSON.")
    if "sshs_model_hash" in metadata and file.about.naming == "kohya":
        recorded = {key: metadata[key] for key in ("sshs_model_hash", "sshs_legacy_hash") if key in metadata}
        found = hashes({name: file.tensors[ours] for name, ours in file.about.names.items()}, metadata)
        wrong = [key for key, value in recorded.items() if found[key] != value]
        problem = (
            f"{' and '.join(wrong)} are not those of the content: it was changed after it was written." if wrong else ""
        )
        findings.add("the hashes are those of the content", problem)


def _is_json(text: str) -> bool:
    try:
        json.loads(text.replace("None", "null") if text == "None" else text)
    except ValueError:
        return False
    return True
