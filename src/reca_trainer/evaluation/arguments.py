"""What an evaluation is told: dataclasses whose fields are the options of `reca-trainer evaluate` and `compare`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from reca_trainer.evaluation import dpg, geneval, understanding
from reca_trainer.evaluation.generation import parse_value


@dataclass(kw_only=True)
class BenchmarkArguments:
    """What is measured, and how.

    Raises:
        ValueError: a value is out of its range, or an option would be ignored.
    """

    benchmark: Literal["geneval", "dpg", "reconstruction", "understanding"] = field(
        metadata={"help": "What the model is scored on."}
    )
    output_dir: str = field(metadata={"help": "Folder for images, results.jsonl and the report."})
    limit: int | None = field(
        default=None, metadata={"help": "Use only so many prompts, images or questions, spread evenly."}
    )
    batch_size: int = field(default=1, metadata={"help": "Images generated, or questions answered, at once."})
    images_per_prompt: int | None = field(
        default=None, metadata={"help": "Without: 4, as GenEval and DPG-Bench publish, or what --protocol says."}
    )
    seed: int = field(default=0, metadata={"help": "Determines, with prompt and number, every image."})
    dtype: str = field(default="bfloat16", metadata={"help": "Data type of the model's weights."})
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "NF4 weights, as in training with --load_in_4bit, so that a small GPU scores what it trained. An "
            "adapter of a quantised base gets that base also without it."
        },
    )
    protocol: Literal["default", "paper"] = field(
        default="default",
        metadata={
            "help": "How images are sampled: 'default' as the model does by itself, 'paper' as the authors of RecA did with "
            "the model's family on this benchmark. Values of --sampling win over both."
        },
    )
    sampling: list[str] = field(
        default_factory=list,
        metadata={
            "metavar": "NAME=VALUE",
            "help": "Arguments of generate_images (of generate_text for understanding), such as num_inference_steps=50; in "
            "Python a dict, which this field always is once it is set.",
        },
    )

    prompts_file: str | None = field(
        default=None,
        metadata={
            "help": "GenEval: prompts of your own, such as rewritten ones; lines of JSON in the form of its "
            "evaluation_metadata.jsonl. Without: the published 553."
        },
    )
    detector: str = field(
        default=geneval.DETECTOR, metadata={"help": "GenEval: a Mask2Former for COCO instances, folder or Hub id."}
    )
    detector_revision: str | None = field(
        default=None, metadata={"help": "GenEval: the detector's commit on the Hub; of the default a pinned one."}
    )
    color_classifier: str = field(
        default=geneval.COLOR_CLASSIFIER, metadata={"help": "GenEval: a CLIP model, folder or Hub id."}
    )
    color_classifier_revision: str | None = field(
        default=None, metadata={"help": "GenEval: the classifier's commit on the Hub; of the default a pinned one."}
    )

    prompts: str | None = field(
        default=None, metadata={"help": "DPG: the benchmark's CSV file, or a Hub dataset with its columns."}
    )
    judge: str | None = field(
        default=None,
        metadata={"help": "DPG: an image-text-to-text model of transformers, or a model's name at --judge_url."},
    )
    judge_revision: str | None = field(default=None, metadata={"help": "DPG: the judge's commit on the Hub."})
    judge_url: str | None = field(
        default=None, metadata={"help": "DPG: OpenAI-compatible endpoint, such as http://localhost:8000/v1."}
    )
    judge_instruction: str = field(default=dpg.INSTRUCTION, metadata={"help": "DPG: added to each question."})
    grids: str | None = field(
        default=None, metadata={"help": "DPG: folder for grids of 2 × 2 images, as the original scorer reads them."}
    )

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Reconstruction, understanding: folder or Hub id of images (for understanding with the columns image, "
            "question and answer; without it, understanding asks the --tasks)."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Its split."})
    tasks: list[str] = field(
        default_factory=lambda: list(understanding.TASKS),
        metadata={
            "help": "Understanding: tasks of lmms-eval. Without: those of the paper's table, which are MME, POPE, GQA, MMMU "
            "and SEED-Bench."
        },
    )
    instruction: str | None = field(
        default=None,
        metadata={
            "help": "Reconstruction: what the model is asked for. Without: a request for a detailed description, or what "
            "--protocol says."
        },
    )
    clip: str | None = field(
        default=None,
        metadata={
            "help": "A CLIP model, folder or Hub id. Reconstruction: similarity of image and reconstruction. GenEval, DPG: "
            "diversity, the mean distance (1 - cosine) of a prompt's images."
        },
    )
    lpips: bool = field(
        default=False,
        metadata={
            "help": "LPIPS, which needs torchvision and downloads AlexNet once. Reconstruction: distance of image and "
            "reconstruction. GenEval, DPG: diversity, the mean distance of a prompt's images."
        },
    )

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, dict):
            self.sampling = parse_sampling(self.sampling)
        if self.prompts_file is not None and self.benchmark != "geneval":
            raise ValueError(f"--prompts_file is GenEval's; {self.benchmark} does not read it.")
        if self.benchmark == "dpg" and not (self.prompts and self.judge):
            raise ValueError("dpg needs --prompts (its CSV file) and --judge.")
        if self.benchmark == "reconstruction" and not self.dataset:
            raise ValueError("reconstruction needs --dataset.")
        if self.benchmark == "understanding":
            for name, default in (("protocol", "default"), ("clip", None), ("lpips", False)):
                if getattr(self, name) != default:
                    raise ValueError(f"--{name} is about images that were made; understanding makes none.")
        if self.tasks != list(understanding.TASKS) and (self.benchmark != "understanding" or self.dataset):
            raise ValueError("--tasks is for understanding without --dataset; nothing else reads it.")


@dataclass(kw_only=True)
class EvaluationArguments(BenchmarkArguments):
    """What `evaluate` measures: a model, or images that were made elsewhere."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of the model."})
    adapter: str | None = field(default=None, metadata={"help": "Folder or Hub id of a PEFT adapter for it."})
    images: str | None = field(
        default=None, metadata={"help": "Score the images of this folder instead of generating them."}
    )

    def __post_init__(self) -> None:
        if (self.model is None) == (self.images is None):
            raise ValueError("give either --model or --images.")
        if self.images is not None:
            if self.benchmark not in ("geneval", "dpg"):
                raise ValueError(f"{self.benchmark} needs a --model; it does not score images made elsewhere.")
            making = (("adapter", None), ("prompts_file", None), ("protocol", "default"), ("load_in_4bit", False))
            for name, default in making:
                if getattr(self, name) != default:
                    raise ValueError(f"--{name} is about making images; with --images they are made already.")
        super().__post_init__()


@dataclass(kw_only=True)
class ComparisonArguments(BenchmarkArguments):
    """What `compare` measures of every model."""

    benchmark: Literal["geneval", "dpg", "understanding"] = field(
        metadata={"help": "What the models are scored on; understanding means the --tasks of lmms-eval."}
    )
    thumbnail: int = field(default=224, metadata={"help": "Longest side of the page's images, in pixels."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.benchmark == "understanding" and self.dataset:
            raise ValueError("compare asks the --tasks of lmms-eval; questions in a --dataset are for evaluate.")


def parse_sampling(pairs: Iterable[str]) -> dict[str, Any]:
    """`["height=512", "name=value"]` → `{"height": 512, "name": "value"}`, see `parse_value`.

    Raises:
        ValueError: a pair is no `NAME=VALUE`.
    """
    sampling = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--sampling takes NAME=VALUE, not {pair!r}.")
        sampling[name] = parse_value(value)
    return sampling
