"""Every argument of a RecA run."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from reca_trainer.inherited_options import refuse_meaningless
from reca_trainer.tasks import TASKS, parse_task_mix

# What a preview draws from text, step after step, unless the user names other prompts.
PREVIEW_PROMPTS = ["a red apple on a wooden table", "two cats beside a blue chair", "a street in the rain at night"]

# Options that say how a dataset is read that is given by name, and their defaults.
OF_A_NAMED_DATASET = {"data_files": None, "dataset_config_name": None, "dataset_split": "train", "dataset_streaming": False}


@dataclass(repr=False)  # that of TrainingArguments hides tokens
class RecAConfig(TrainingArguments):
    r"""Arguments of a [`RecATrainer`]: those of `transformers.TrainingArguments`, and what RecA adds.

    Defaults that differ from `TrainingArguments` are the paper's settings for BAGEL where it has one (its command line
    and training script), except for the warm-up: the released command warms up for all of its 1,000 steps, so its
    learning rate never reaches 4e-5; ours warms up for 5 % of the run and then stays constant.
    """

    # --- the objective ---
    reca_weight: float = field(default=1.0, metadata={"help": "λ_reca, weight of the reconstruction loss. Paper: 1."})
    image_to_text_weight: float | None = field(
        default=None,
        metadata={
            "help": "λ_i2t, weight of the image-to-text loss, which keeps understanding alive where it shares weights "
            "with generation. Default: 1 for models that share weights, 0 for those that do not (paper, section 3)."
        },
    )
    text_to_image_weight: float = field(
        default=0.0,
        metadata={
            "help": "λ_t2i, weight of the text-to-image loss. Paper: 0. On the embedded default text-to-image in every second "
            "step (task_mix reconstruct=1,generate=1) keeps what RecA alone costs short prompts."
        },
    )
    edit_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the editing loss: an image is made from a source image and an instruction. Only for families "
            "that edit (BAGEL, Lance). 0: none, as in the paper."
        },
    )
    task_mix: str | None = field(
        default=None,
        metadata={
            "help": "Micro-batches of each task per turn, such as reconstruct=2,caption=2 (Harmon's setting). "
            "Default: one of each task whose weight is not 0."
        },
    )
    instruction_dropout: float = field(
        default=0.1,
        metadata={
            "help": "Probability that an image is reconstructed, or edited, without its instruction, in the family's "
            "unconditional form. Official runs: BAGEL and Harmon 0.1, OpenUni and Show-o 0."
        },
    )
    caption_dropout: float = field(
        default=0.1,
        metadata={
            "help": "Probability that an image of the text-to-image term goes without its caption, in the family's "
            "unconditional form. Official runs: 0.1."
        },
    )
    edit_source_dropout: float = field(
        default=0.3,
        metadata={
            "help": "Probability that an edit goes without its source's latents and, drawn apart, without its embeddings; "
            "Lance drops both at once. As BAGEL's script."
        },
    )
    condition_token_dropout: float | None = field(
        default=None,
        metadata={
            "help": "Share of the condition's embeddings that a reconstruction goes without, drawn for every image: a stronger "
            "bottleneck, for models that copy their condition (IOMM, arXiv 2603.16139). 0: none, as in the paper, and the "
            "default but for Qwen-Image-Edit, which has 0.85."
        },
    )
    instructions_file: str | None = field(
        default=None,
        metadata={
            "help": "Text file of reconstruction instructions, one a line, instead of the built-in ones; every image draws "
            "its own."
        },
    )
    token_weighting: str = field(
        default="target",
        metadata={
            "help": "How the micro-batches of a step are weighted: 'target' by the number of their supervised targets, "
            "which gives the loss of one large batch; 'micro_batch' all alike, as the official loops of Harmon, OpenUni "
            "and Show-o do."
        },
    )

    timesteps_per_image: int = field(
        default=1,
        metadata={
            "help": "Timesteps and noises drawn for every image, which share its condition: a better gradient for less than "
            "as many images would take. Only for families whose loss allows it (BAGEL)."
        },
    )

    freeze_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parts of the generator that are not trained, by the names of modules or parameters or the beginnings of "
            "them up to a dot, such as transformer, which is OpenUni's SANA. By default all of it is, or the adapter."
        },
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Decay per step of an exponential moving average of the trained weights, which then is what is "
            "evaluated and saved in the end. It has to fit the run: BAGEL's 0.9999 leaves 90 % of the starting weights "
            "after 1,000 steps, 0.995 leaves 0.7 %. 0: no average."
        },
    )

    # --- the data ---
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Images to train on: a folder, an archive, a table or a dataset id on the Hub."},
    )
    data_files: list[str] | None = field(
        default=None,
        metadata={
            "help": "Patterns of the files in it to read, such as '**/*.tar'; without, all that are of one kind."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Its split to train on."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read it as a stream; needs max_steps."})
    caption_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Another dataset for the image-to-text term, with captions or conversations."},
    )
    edit_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Another dataset for the editing term: with sources, instructions and targets, or with BAGEL's chains "
            "(image_list and instruction_list)."
        },
    )
    eval_size: int = field(
        default=0, metadata={"help": "Rows held out of the training set for evaluation where no eval set is given."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Name of the image column. Default: found by its type."}
    )
    caption_column: str | None = field(default=None, metadata={"help": "Name of the caption column."})
    conversation_column: str | None = field(default=None, metadata={"help": "Name of the conversation column."})
    image_root: str | None = field(
        default=None,
        metadata={"help": "Folder that relative image paths in a table start from, such as LLaVA's."},
    )
    max_image_size: int | None = field(
        default=None,
        metadata={
            "help": "Longest side of a target in pixels, for families whose targets keep the picture's shape (BAGEL: 1024). "
            "A smaller one makes steps cheaper."
        },
    )
    min_image_size: int | None = field(
        default=None,
        metadata={"help": "Shortest side of a target in pixels where max_image_size allows it (BAGEL: 512)."},
    )
    on_bad_image: str = field(
        default="raise",
        metadata={
            "help": "What to do with an image that cannot be decoded: 'raise' an error that names it, or 'skip' it, "
            "counted and logged, in favour of another row, drawn from all."
        },
    )

    max_bad_share: float = field(
        default=0.1,
        metadata={
            "help": "Share of rows that may be left out (damaged images, conversations without an answer) before the run "
            "stops, counted over all processes from 100 rows on."
        },
    )

    cache_latents: bool = field(
        default=False,
        metadata={
            "help": "Compute what frozen encoders make of the training images (autoencoder's posterior, understanding "
            "embeddings) once, before the first step, and keep it in the cache folder of `datasets`; or read it from shards "
            "that `reca-trainer precompute` has written. Losses stay the same."
        },
    )

    # --- the model ---
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of from_pretrained where the model is given by name, such as dtype or revision."},
    )

    processor_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of the family's processor in place of its own, such as condition_size; they are saved with the "
            "result."
        },
    )

    # --- what can be watched ---
    preview_steps: int = field(
        default=0,
        metadata={
            "help": "Steps between preview pictures (input | reconstruction from its embeddings | text-to-image) "
            "in output_dir/previews and in the tracker; also one before and one after training. 0: none."
        },
    )
    score_images: int = field(
        default=0,
        metadata={"help": "Held-out images whose reconstructions are scored (PSNR, SSIM) at every evaluation."},
    )
    preview_images: int = field(default=4, metadata={"help": "Images in a preview."})
    preview_prompts: list[str] | None = field(
        default=None, metadata={"help": "Fixed prompts of the preview's text-to-image column."}
    )
    preview_generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of generate_images for the preview, such as num_inference_steps."},
    )
    collapse_threshold: float = field(
        default=0.02,
        metadata={
            "help": "Collapse alarm: warns when the reconstruction loss falls below this share of its first value, "
            "which a model that copies its condition reaches and an aligned one does not."
        },
    )
    max_nonfinite_steps: int = field(
        default=0,
        metadata={
            "help": "Steps whose loss or gradient is not finite that are left out, counted and logged with their images, "
            "before the run stops with an error. 0: it stops at the first."
        },
    )
    # --- TrainingArguments by their names of today, which transformers before 5.23 lacks ---
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Compute activations again in the backward pass: less memory, more time.",
            "nargs": "?",
            "const": True,
        },
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the model's `activation_checkpointing_enable`."}
    )
    # --- TrainingArguments with other defaults ---
    learning_rate: float = field(default=4e-5, metadata={"help": "Paper: 4e-5 for BAGEL's whole generator."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "As BAGEL's script."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or a share of the run if below 1."})
    adam_beta2: float = field(default=0.95, metadata={"help": "As BAGEL's script."})
    adam_epsilon: float = field(default=1e-15, metadata={"help": "As BAGEL's script."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator picks its columns itself."})
    do_train: bool = field(default=True, metadata={"help": "A run trains."})

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "processor_kwargs", "preview_generation_kwargs"]  # noqa: RUF012

    def __post_init__(self) -> None:
        if not hasattr(TrainingArguments, "activation_checkpointing"):
            self.gradient_checkpointing = bool(self.activation_checkpointing or self.gradient_checkpointing)
            self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs
        if self.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"):  # `TrainingArguments` gives gloo no timeout
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
        super().__post_init__()
        refuse_meaningless(self)
        least = {
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "eval_size": 0,
            "preview_steps": 0,
            "preview_images": 1,
            "score_images": 0,
            "max_nonfinite_steps": 0,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} is {bound} or more, not {getattr(self, name)}.")
        hub_strategy = HubStrategy(self.hub_strategy)
        if hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise ValueError(
                f"hub_strategy is 'end' or 'every_save', not {hub_strategy.value!r}: a model is uploaded, and what resumes "
                "its run is not."
            )
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(
                f"Nothing would be trained: {self.max_steps=}, {self.num_train_epochs=}.".replace("self.", "")
            )
        weights = {name: getattr(self, task.weight_option) or 0.0 for name, task in TASKS.items()}
        if min(weights.values()) < 0 or max(weights.values()) == 0:
            raise ValueError(f"Loss weights are non-negative and not all zero; got {weights}.")
        if isinstance(self.model_init_kwargs, dict) and self.model_init_kwargs.get("token"):
            raise ValueError(
                "A token in model_init_kwargs would be written into every checkpoint: log in with `hf auth login`, or set "
                "HF_TOKEN, instead."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is at least 0 and below 1, not {self.ema_decay}.")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share is a share of all rows, not {self.max_bad_share}.")
        for name in ("instruction_dropout", "caption_dropout", "edit_source_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, not {getattr(self, name)}.")
        if not 0 <= (self.condition_token_dropout or 0) < 1:
            raise ValueError(f"condition_token_dropout is a share below 1, not {self.condition_token_dropout}.")
        if self.condition_token_dropout and not self.reca_weight:
            raise ValueError("condition_token_dropout is about reconstructions, and reca_weight is 0.")
        if self.token_weighting not in ("target", "micro_batch"):
            raise ValueError(f"token_weighting is 'target' or 'micro_batch', not {self.token_weighting!r}.")
        if self.edit_dataset_name is not None and not self.edit_weight:
            raise ValueError(f"edit_dataset_name={self.edit_dataset_name!r} is about the editing term: set edit_weight.")
        if self.dataset_name is None and self.caption_dataset_name is None and self.edit_dataset_name is None:
            for name, default in OF_A_NAMED_DATASET.items():
                if (value := getattr(self, name)) != default:
                    raise ValueError(f"{name}={value!r} is about dataset_name, which is not set.")
        if self.instructions_file is not None:
            self.read_instructions()
        if self.on_bad_image not in ("raise", "skip"):
            raise ValueError(f"on_bad_image is 'raise' or 'skip', not {self.on_bad_image!r}.")
        if self.timesteps_per_image < 1:
            raise ValueError(f"timesteps_per_image is 1 or more, not {self.timesteps_per_image}.")
        if self.task_mix is not None:
            parse_task_mix(self.task_mix)

    def __getstate__(self) -> dict[str, Any]:
        """Without the token: `Trainer` pickles its arguments into every checkpoint."""
        return {**self.__dict__, "hub_token": None}

    def read_instructions(self) -> list[str] | None:
        """The lines of `instructions_file` that are not blank; `None` without such a file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it has no instruction.
        """
        if self.instructions_file is None:
            return None
        lines = Path(self.instructions_file).read_text(encoding="utf-8").splitlines()
        instructions = [line.strip() for line in lines if line.strip()]
        if not instructions:
            raise ValueError(f"instructions_file={self.instructions_file} has no instruction: write one a line.")
        return instructions

    def task_pattern(self, weights: dict[str, float]) -> dict[str, int]:
        """Micro-batches per turn of every task with a positive weight in `weights`."""
        if self.task_mix is None:
            return {task: 1 for task in TASKS if weights.get(task, 0) > 0}
        counts = dict.fromkeys(TASKS, 0) | parse_task_mix(self.task_mix)
        contradictions = [task for task in TASKS if (counts[task] > 0) != (weights.get(task, 0) > 0)]
        if contradictions:
            raise ValueError(
                f"task_mix {self.task_mix} and the loss weights {weights} disagree about {', '.join(contradictions)}: "
                "a task needs both a positive weight and a positive share, or neither."
            )
        return {task: counts[task] for task in TASKS if counts[task]}
