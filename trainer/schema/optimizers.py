"""Every optimizer and scheduler: where it comes from and what it may be told. One row each.

Needs no torch, so that wrong arguments are found before anything is loaded; a test holds the
listed arguments against the classes' own signatures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_PAGED = "betas eps weight_decay amsgrad optim_bits min_8bit_size"
_DADAPT = "d0 growth_rate weight_decay weight_decouple fixed_decay maximize foreach"
# Names of the dadaptation package, which presets are written for.
_DADAPT_OLDER = {"decouple": "weight_decouple", "use_bias_correction": "bias_correction"}
_ADAN = "betas eps weight_decay no_prox log_every d0 growth_rate"
_FREE = "weight_decay r weight_lr_power foreach"


@dataclass(frozen=True)
class Row:
    """A class, the `arguments` it may get beside rate and weights, and what makes it special.

    `fixed` arguments are part of what the name means; `defaults` may be overridden; `older` maps
    other libraries' spellings. `adapts`: it finds its own rate and takes ours as a factor.
    `one_rate`: that factor is one for all parts and blocks. `schedule_free`: it averages weights instead of following a schedule.
    `paged`: it needs a GPU for what sets it apart from the unpaged one. `package`: what to
    install where it is not part of the program.
    """

    module: str
    name: str
    arguments: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    older: Mapping[str, str] = field(default_factory=dict)
    adapts: bool = False
    one_rate: bool = False
    schedule_free: bool = False
    paged: bool = False
    package: str = ""

    @property
    def valid(self) -> list[str]:
        """The names that Optimizer extra arguments may hold, newer spellings first."""
        own = self.arguments.split()
        return own + [older for older, newer in self.older.items() if newer in own]


_DADAPT_ADAM = Row(
    "pytorch_optimizer",
    "DAdaptAdam",
    f"betas bias_correction eps {_DADAPT}",
    older=_DADAPT_OLDER,
    adapts=True,
    one_rate=True,
)

OPTIMIZERS = {
    "AdamW": Row(
        "torch.optim", "AdamW", "betas eps weight_decay amsgrad maximize foreach capturable differentiable fused"
    ),
    "AdamWScheduleFree": Row(
        "schedulefree", "AdamWScheduleFree", f"betas eps warmup_steps {_FREE}", schedule_free=True
    ),
    "AdamW8bit": Row("bitsandbytes.optim", "AdamW8bit", f"{_PAGED} is_paged"),
    "Adafactor": Row(
        "transformers.optimization",
        "Adafactor",
        "eps clip_threshold decay_rate beta1 weight_decay scale_parameter relative_step warmup_init",
        {"relative_step": True},
    ),
    "bitsandbytes.optim.AdEMAMix8bit": Row(
        "bitsandbytes.optim", "AdEMAMix8bit", "betas alpha t_alpha t_beta3 eps weight_decay min_8bit_size is_paged"
    ),
    "bitsandbytes.optim.PagedAdEMAMix8bit": Row(
        "bitsandbytes.optim",
        "PagedAdEMAMix8bit",
        "betas alpha t_alpha t_beta3 eps weight_decay min_8bit_size",
        paged=True,
    ),
    "DAdaptation": _DADAPT_ADAM,
    "DAdaptAdaGrad": Row(
        "pytorch_optimizer",
        "DAdaptAdaGrad",
        f"momentum eps {_DADAPT}",
        {"eps": 1e-6},
        older=_DADAPT_OLDER,
        adapts=True,
        one_rate=True,
    ),
    "DAdaptAdam": _DADAPT_ADAM,
    # pytorch_optimizer 4.1 squares Adan's squares once more, so its steps grow where gradients are small.
    "DAdaptAdan": Row("dadaptation", "DAdaptAdan", _ADAN, adapts=True, one_rate=True, package="dadaptation"),
    "DAdaptAdanIP": Row(
        "dadaptation.experimental", "DAdaptAdanIP", _ADAN, adapts=True, one_rate=True, package="dadaptation"
    ),
    "DAdaptAdamPreprint": Row(
        "dadaptation.experimental",
        "DAdaptAdamPreprint",
        "betas eps weight_decay log_every decouple d0 growth_rate fsdp_in_use",
        adapts=True,
        one_rate=True,
        package="dadaptation",
    ),
    "DAdaptLion": Row(
        "pytorch_optimizer",
        "DAdaptLion",
        "betas d0 weight_decay weight_decouple fixed_decay maximize foreach",
        older=_DADAPT_OLDER,
        adapts=True,
        one_rate=True,
    ),
    "DAdaptSGD": Row(
        "pytorch_optimizer",
        "DAdaptSGD",
        f"momentum {_DADAPT}",
        {"momentum": 0.0},
        older=_DADAPT_OLDER,
        adapts=True,
        one_rate=True,
    ),
    "Lion": Row("pytorch_optimizer", "Lion", "betas weight_decay weight_decouple fixed_decay foreach maximize"),
    "Lion8bit": Row("bitsandbytes.optim", "Lion8bit", "betas weight_decay min_8bit_size is_paged"),
    "PagedAdamW": Row("bitsandbytes.optim", "PagedAdamW", _PAGED, paged=True),
    "PagedAdamW8bit": Row("bitsandbytes.optim", "PagedAdamW8bit", _PAGED, paged=True),
    "PagedAdamW32bit": Row("bitsandbytes.optim", "PagedAdamW32bit", _PAGED, paged=True),
    "PagedLion8bit": Row("bitsandbytes.optim", "PagedLion8bit", "betas weight_decay min_8bit_size", paged=True),
    "Prodigy": Row(
        "prodigyopt",
        "Prodigy",
        "betas beta3 eps weight_decay decouple use_bias_correction safeguard_warmup d0 d_coef growth_rate "
        "fsdp_in_use slice_p",
        adapts=True,
        one_rate=True,
    ),
    "prodigyplus.ProdigyPlusScheduleFree": Row(
        "prodigyplus",
        "ProdigyPlusScheduleFree",
        "betas beta3 weight_decay weight_decay_by_lr d0 d_coef d_limiter prodigy_steps schedulefree_c eps "
        "split_groups split_groups_mean factored factored_fp32 use_bias_correction use_stableadamw "
        "use_schedulefree use_speed stochastic_rounding fused_back_pass use_cautious use_grams use_adopt "
        "use_orthograd use_focus",
        adapts=True,
        schedule_free=True,
        package="prodigy-plus-schedule-free",
    ),
    "pytorch_optimizer.CAME": Row(
        "pytorch_optimizer",
        "CAME",
        "betas weight_decay weight_decouple fixed_decay clip_threshold ams_bound eps1 eps2 maximize foreach",
    ),
    "RAdamScheduleFree": Row(
        "schedulefree", "RAdamScheduleFree", f"betas eps silent_sgd_phase {_FREE}", schedule_free=True
    ),
    "SGDNesterov": Row(
        "torch.optim",
        "SGD",
        "momentum dampening weight_decay maximize foreach differentiable",
        {"momentum": 0.9},
        fixed={"nesterov": True},
    ),
    "SGDNesterov8bit": Row(
        "bitsandbytes.optim",
        "SGD8bit",
        "momentum dampening weight_decay min_8bit_size",
        {"momentum": 0.9},
        fixed={"nesterov": True},
    ),
    "SGDScheduleFree": Row("schedulefree", "SGDScheduleFree", f"momentum warmup_steps {_FREE}", schedule_free=True),
}

# Beside each scheduler the extra arguments that it takes.
SCHEDULERS = {
    "adafactor": "",
    "constant": "",
    "constant_with_warmup": "",
    "cosine": "num_cycles",
    "cosine_with_restarts": "num_cycles",
    "linear": "",
    "polynomial": "power lr_end",
    "cosine_with_min_lr": "min_lr min_lr_rate num_cycles",
    "piecewise_constant": "step_rules",
    "warmup_stable_decay": "num_decay_steps num_stable_steps min_lr_ratio num_cycles warmup_type decay_type",
    "inverse_sqrt": "timescale",
}
