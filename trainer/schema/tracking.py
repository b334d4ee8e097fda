"""Curves and pictures of a run, beside the page: TensorBoard, Weights & Biases."""

from typing import Literal

from trainer.schema.declare import Group, Section, parameter

ONLINE = ("wandb", "all")


class Tracking(Group):
    trackers: Literal["", "tensorboard", "wandb", "all"] = parameter(
        "log_with",
        "",
        "Logging",
        Section.LOGGING,
        """Where the loss, the rates and the samples are written as curves: TensorBoard's files,
        Weights & Biases, or both. Empty: TensorBoard if Logging folder is set. The live page shows
        them in any case.""",
    )
    wandb_key: str = parameter(
        "wandb_api_key",
        "",
        "WANDB API Key",
        Section.LOGGING,
        """Your key at wandb.ai. It is handed to the trainer and stored nowhere, so enter it each
        time, or start the page with WANDB_API_KEY set. Without one the run is kept on this machine,
        and `wandb sync` uploads it later.""",
        kind="secret",
        when={"log_with": ONLINE},
    )
    wandb_run: str = parameter(
        "wandb_run_name",
        "",
        "WANDB run name",
        Section.LOGGING,
        """What this run is called at Weights & Biases. Empty: the model output name.""",
        placeholder="empty: the model output name",
        when={"log_with": ONLINE},
    )
    project: str = parameter(
        "log_tracker_name",
        "",
        "Log tracker name",
        Section.LOGGING,
        """The project that runs are collected under: at Weights & Biases, and as a folder of
        TensorBoard's. Empty: lorawright.""",
        placeholder="empty: lorawright",
    )
    with_settings: bool = parameter(
        "log_config",
        False,
        "Log config",
        Section.LOGGING,
        """Write all settings beside the curves as well, except the key. They hold the paths of your
        folders, and at Weights & Biases they can be as public as the run.""",
    )
