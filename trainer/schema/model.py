"""The base model, and how the trained file is written."""

from typing import Literal

from trainer.schema.declare import Group, Section, parameter

Precision = Literal["float", "fp16", "bf16"]


class Model(Group):
    path: str = parameter(
        "pretrained_model_name_or_path",
        "",
        "Pretrained model name or path",
        Section.BASE_MODEL,
        """The model that the LoRA is made for: a folder in diffusers' layout, or one .safetensors
        file as the web UIs use them. Empty: the small model that comes with the program, good for
        trying things out. A LoRA works best on the model it was trained on, so pick the plain base
        model when the LoRA should fit many of its children.""",
        kind="model",
        placeholder="empty = the embedded demo model",
    )
    quick_pick: str = parameter(
        "model_list",
        "custom",
        "Model Quick Pick",
        Section.BASE_MODEL,
        """A model that was found on this machine; picking one fills the path above. "custom" leaves
        the path to you.""",
    )
    v2: bool = parameter(
        "v2",
        False,
        "v2",
        Section.BASE_MODEL,
        """Tick it for Stable Diffusion 2.x. The file itself is looked at as well: if it is of
        another family, training is refused with what was found.""",
    )
    v_parameterization: bool = parameter(
        "v_parameterization",
        False,
        "v_parameterization",
        Section.BASE_MODEL,
        """The model predicts velocity instead of noise, as SD 2.x at 768 pixels does. Wrong here
        means grey mush, so the files are checked where they say which it is.""",
    )
    sdxl: bool = parameter(
        "sdxl",
        False,
        "SDXL",
        Section.BASE_MODEL,
        """Tick it for SDXL and its children. The file is looked at as well; a contradiction is
        refused.""",
    )
    vae: str = parameter(
        "vae",
        "",
        "VAE",
        Section.BASE_MODEL,
        """Another VAE, as a file or a diffusers folder, used to encode the images and to draw the
        samples. Empty: the one inside the base model, which is nearly always right.""",
        kind="model",
        placeholder="empty = the base model's own",
    )


class Saving(Group):
    name: str = parameter(
        "output_name",
        "last",
        "Model output name",
        Section.FOLDERS,
        """The LoRA's file name without its ending. The final file is NAME.safetensors; those in
        between get the epoch or step added.""",
    )
    format: Literal["safetensors", "ckpt", "pt"] = parameter(
        "save_model_as",
        "safetensors",
        "Save trained model as",
        Section.TRAINED_MODEL,
        """Always safetensors. Old presets may say ckpt or pt; those can hide programs, so
        safetensors is written instead and the log says so.""",
    )
    precision: Precision = parameter(
        "save_precision",
        "fp16",
        "Save precision",
        Section.TRAINED_MODEL,
        """How exactly numbers are stored in the LoRA file. fp16 halves the size of float and looks
        the same; bf16 is as small and rounds more coarsely.""",
    )
    comment: str = parameter(
        "training_comment",
        "",
        "Training comment",
        Section.TRAINED_MODEL,
        """A note kept in the file (ss_training_comment): trigger words, what the LoRA is for.
        Anyone who has the file can read it.""",
    )
    every_n_epochs: int = parameter(
        "save_every_n_epochs",
        1,
        "Save every N epochs",
        Section.LENGTH,
        """A LoRA file after every N epochs, so that an earlier one can be picked when the last has
        learned too much. 0: only the final file.""",
        ge=0,
    )
    every_n_steps: int = parameter(
        "save_every_n_steps",
        0,
        "Save every N steps",
        Section.SAVING,
        """The same by steps: with 200, files after steps 200, 400, 600 … 0: off.""",
        ge=0,
    )


class Folders(Group):
    images: str = parameter(
        "train_data_dir",
        "",
        "Image folder",
        Section.FOLDERS,
        """The folder that holds the image folders. Each inner folder is called NN_name: NN is how
        often its images are seen in an epoch, and name is the caption of images that have no
        caption file. A folder with images directly inside works too (seen once each).""",
        kind="folder",
        placeholder="/data/cat   (holds 10_cat, 5_kitten …)",
    )
    regularisation: str = parameter(
        "reg_data_dir",
        "",
        "Regularisation folder",
        Section.FOLDERS,
        """Images of the general kind (any cats, when one cat is taught), in the same layout. They
        remind the model of what the word meant before. As many of them as training images are seen
        in an epoch, so training takes twice as long. Empty: none.""",
        kind="folder",
        placeholder="optional",
    )
    output: str = parameter(
        "output_dir",
        "",
        "Output folder",
        Section.FOLDERS,
        """Where the LoRA files go. Empty: a folder "output" inside the run's own folder, where
        nothing can be overwritten.""",
        kind="folder",
        placeholder="empty = inside the run's folder",
    )
    logging: str = parameter(
        "logging_dir",
        "",
        "Logging folder",
        Section.FOLDERS,
        """TensorBoard files (loss, rates, samples) are written here. Empty: none; the page shows
        the curves either way.""",
        kind="folder",
        placeholder="optional",
    )
