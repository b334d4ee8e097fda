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
        placeholder="empty: the embedded demo model",
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
        """Switch on for Stable Diffusion 2.x, base and 768. The file itself is looked at as well: what
        contradicts it is refused with what was found.""",
    )
    v_parameterization: bool = parameter(
        "v_parameterization",
        False,
        "v_parameterization",
        Section.BASE_MODEL,
        """The model predicts velocity instead of noise, as SD 2.x at 768 pixels and NoobAI's v-pred
        versions do. Wrong here means grey mush, so the files are checked where they say which it is.""",
    )
    sdxl: bool = parameter(
        "sdxl",
        False,
        "SDXL",
        Section.BASE_MODEL,
        """Switch on for SDXL and its children: Pony, Illustrious, NoobAI. The file is looked at as
        well; a contradiction is refused. Set Max resolution to 1024,1024 with it.""",
    )
    vae: str = parameter(
        "vae",
        "",
        "VAE",
        Section.BASE_MODEL,
        """Another VAE, as a file or a diffusers folder, used to encode the images and to draw the
        samples. Empty: the one inside the base model, which is nearly always right.""",
        kind="model",
        placeholder="empty: the base model's own",
    )
    full_vae: bool = parameter(
        "sdxl_no_half_vae",
        False,
        "No half VAE",
        Section.BASE_MODEL,
        """The VAE computes in full precision whatever Mixed precision says. SDXL's own VAE overflows in fp16: black
        samples, or an error that asks for this. Caching gets slower and takes more memory; bf16 does not need it.""",
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
    title: str = parameter(
        "metadata_title",
        "",
        "Metadata title",
        Section.TRAINED_MODEL,
        """The LoRA's title, kept in the file (modelspec.title) and shown by model managers. Empty: the file's
        name.""",
        placeholder="empty: the file's name",
    )
    author: str = parameter(
        "metadata_author",
        "",
        "Metadata author",
        Section.TRAINED_MODEL,
        """Who made it (modelspec.author). Anyone who has the file can read it; empty: nothing is written.""",
    )
    description: str = parameter(
        "metadata_description",
        "",
        "Metadata description",
        Section.TRAINED_MODEL,
        """What it shows and how to use it, trigger words included (modelspec.description).""",
    )
    license: str = parameter(
        "metadata_license",
        "",
        "Metadata license",
        Section.TRAINED_MODEL,
        """What others may do with it, for instance CC-BY-4.0 (modelspec.license). The base model's licence holds as
        well.""",
    )
    tags: str = parameter(
        "metadata_tags",
        "",
        "Metadata tags",
        Section.TRAINED_MODEL,
        """Words to find it by, separated by commas (modelspec.tags).""",
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
    last_n_steps: int = parameter(
        "save_last_n_steps",
        0,
        "Save last N steps",
        Section.SAVING,
        """Of the files saved by steps, those from more than N steps ago are deleted: every 100 and last 300
        leaves four. Only files that this run wrote. 0: all are kept.""",
        ge=0,
    )
    last_n_steps_state: int = parameter(
        "save_last_n_steps_state",
        0,
        "Save last N steps state",
        Section.SAVING,
        """The same for state folders, which are larger than LoRA files. 0: as set for the files.""",
        ge=0,
        when={"save_state": True},
    )
    last_n_epochs: int = parameter(
        "save_last_n_epochs",
        0,
        "Save last N epochs",
        Section.SAVING,
        """Of the files saved by epochs, the newest N are kept and older ones of this run deleted. 0: all are
        kept.""",
        ge=0,
    )
    last_n_epochs_state: int = parameter(
        "save_last_n_epochs_state",
        0,
        "Save last N epochs state",
        Section.SAVING,
        """The same for state folders. 0: as set for the files.""",
        ge=0,
        when={"save_state": True},
    )
    state: bool = parameter(
        "save_state",
        False,
        "Save training state",
        Section.SAVING,
        """A folder beside every saved file with all that is needed to go on from there: weights, optimizer,
        scheduler, step; also after a crash or a power cut. Takes about three times the file's room (the optimizer
        keeps two numbers a weight). Off: only a stopped run leaves one, which goes once training has gone on past
        it.""",
    )
    state_at_end: bool = parameter(
        "save_state_on_train_end",
        False,
        "Save training state at end of training",
        Section.SAVING,
        """One such folder when training ends, so that it can be prolonged later; that of a stop is kept, too.""",
    )
    resume: str = parameter(
        "resume",
        "",
        "Resume from saved training state",
        Section.SAVING,
        """A state folder (NAME-state, NAME-000002-state …), or a folder with such, an output folder or a run's, of
        which the newest is taken, and where that is torn the one before it: training goes on at the step behind it
        as if it had never stopped. Give the same settings; what differs is listed at the start. To train longer than
        planned, raise Epoch or Max train steps. auto: the newest state of this Output name in the Output folder, or
        in any run where that is empty; a start from nothing where there is none. Made for rented machines: the same
        command again goes on by itself.""",
        kind="folder",
        placeholder="/output/last-000004-state",
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
        placeholder="empty: inside the run's folder",
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
