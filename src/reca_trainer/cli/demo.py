"""`reca-trainer demo`: a page on which a model and its adapters draw, reconstruct, edit and answer, side by side.

Gradio comes with `pip install "reca-trainer[demo]"`. This file is a Space as it stands: there it is called `app.py`,
`requirements.txt` has `reca-trainer[demo]`, and the variable `RECA_DEMO` holds the arguments of the command.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from transformers import BitsAndBytesConfig

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor, UnifiedModel, UnifiedProcessor, toy
from reca_trainer.adapters import unwrap
from reca_trainer.evaluation.arguments import parse_sampling
from reca_trainer.evaluation.generation import load_model, processes
from reca_trainer.models.auto import resolve
from reca_trainer.models.registry import is_adapter

TABS = {"generate": "Text to image", "reconstruct": "Reconstruct", "edit": "Edit"}
INSTRUCTION = "Describe the image in detail."
QUESTION = "What is in the image?"
STYLE = ".drawn img { width: 100%; height: 100%; object-fit: contain }"  # small pictures fill their place too


@dataclass
class Variant:
    """A model of the page. Adapters of one base share its weights: `adapter` is switched on, `None` switches all off."""

    name: str
    model: UnifiedModel | PeftModel
    processor: UnifiedProcessor
    adapter: str | None = None

    @contextmanager
    def active(self) -> Iterator[UnifiedModel]:
        """The family's model, in the state that this variant stands for."""
        if not isinstance(self.model, PeftModel):
            yield self.model
        elif self.adapter is None:
            with self.model.disable_adapter():
                yield unwrap(self.model)
        else:
            self.model.set_adapter(self.adapter)
            yield unwrap(self.model)


def load(base: str | None, others: Sequence[str] = (), load_in_4bit: bool = False) -> list[Variant]:
    """The base (by default the embedded one) and what is compared with it: its adapters, on one copy of its weights,
    and models of their own.

    Raises:
        ValueError: an adapter trains biases, which cannot be switched off, or has no safetensors.
    """
    dtype = "bfloat16" if processes().device.type == "cuda" else "float32"
    options: dict[str, Any] = {}
    if load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    name_of_base, base = base or "the embedded tiny BAGEL", base or str(toy.CHECKPOINT)
    adapted: PeftModel | None = None
    variants: list[Variant] = []
    for name in others:
        folder = resolve(name)
        if not is_adapter(folder):
            variants.append(Variant(name, *load_model(name, None, dtype, load_in_4bit)))
            continue
        label = str(len(variants))
        if adapted is None:
            label = "default"
            adapted = AutoUnifiedModel.from_pretrained(folder, base_model=base, dtype=dtype, **options).eval()
        elif (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            adapted.load_adapter(str(folder), adapter_name=label)
        else:
            raise ValueError(f"{name} has no {SAFETENSORS_WEIGHTS_NAME}.")
        if getattr(adapted.peft_config[label], "bias", "none") != "none":
            raise ValueError(
                f"{name} trains biases, which cannot be switched off: merge it, and give the merged model."
            )
        variants.append(
            Variant(name, adapted, AutoUnifiedProcessor.from_pretrained(folder, base_model=base), adapter=label)
        )
    if adapted is None:
        return [Variant(name_of_base, *load_model(base, None, dtype, load_in_4bit)), *variants]
    if not getattr(unwrap(adapted), "is_quantized", False):  # the loader has placed quantised weights
        adapted.to(processes().device)
    return [Variant(name_of_base, adapted, AutoUnifiedProcessor.from_pretrained(base)), *variants]


def pictures(
    variants: Sequence[Variant], task: str, text: str | None, image: Image.Image | None, seed: float, **sampling: Any
) -> Iterator[list[Image.Image | None]]:
    """The picture of each variant, all from one seed's noise; after each of them, those that there are."""
    made: list[Image.Image | None] = [None] * len(variants)
    for index, variant in enumerate(variants):
        with variant.active() as model:
            [made[index]] = model.generate_images(
                variant.processor,
                text=text,
                images=image,
                task=task,
                generator=torch.Generator().manual_seed(int(seed)),
                **sampling,
            )
        yield list(made)


def answers(variants: Sequence[Variant], question: str, image: Image.Image | None) -> Iterator[list[str]]:
    """The answer of each variant; after each of them, those that there are."""
    given = [""] * len(variants)
    for index, variant in enumerate(variants):
        with variant.active() as model:
            [given[index]] = model.generate_text(variant.processor, question, image)
        yield list(given)


def make_page(variants: Sequence[Variant], sampling: dict[str, Any]) -> Any:
    """The page, a `gradio.Blocks`; it has a tab for every task that all variants can do.

    Raises:
        ImportError: Gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise ImportError('the page needs Gradio: pip install "reca-trainer[demo]".') from error

    def run(work: Callable[..., Iterator[list[Any]]]) -> Callable[..., Iterator[Any]]:
        def handler(*inputs: Any) -> Iterator[Any]:
            try:
                for results in work(*inputs):
                    yield results if len(results) > 1 else results[0]
            except ValueError as error:  # what the person at the page can mend
                raise gradio.Error(str(error)) from error

        return handler

    models = [unwrap(variant.model) for variant in variants]
    names = [variant.name.rstrip("/").rpartition("/")[2] for variant in variants]
    labels = names if len(set(names)) == len(names) else [variant.name for variant in variants]
    if len(labels) > 1:
        labels = [f"before: {labels[0]}", *(f"after: {label}" for label in labels[1:])]
    with gradio.Blocks(title="RecA before and after", analytics_enabled=False) as page:
        gradio.Markdown("# RecA before and after\nEvery model draws from the same noise.")
        tasks = [task for task in TABS if all(task in model.tasks and task in model.image_tasks for model in models)]
        for task in tasks:
            with gradio.Tab(TABS[task]):
                image = gradio.State(None) if task == "generate" else gradio.Image(type="pil", label="picture")
                if task == "reconstruct":
                    text = gradio.Textbox(INSTRUCTION, label="instruction")
                else:
                    text = gradio.Textbox(label="prompt", placeholder="a red circle above a blue square")
                seed = gradio.Number(0, precision=0, minimum=0, label="seed")
                button = gradio.Button("Draw", variant="primary")
                with gradio.Row():
                    results = [
                        gradio.Image(
                            type="pil",
                            format="png",
                            label=label,
                            height=360,
                            buttons=["download"],
                            elem_classes="drawn",
                        )
                        for label in labels
                    ]

            def draw(text: str, image: Any, seed: float, task: str = task) -> Iterator[list[Any]]:
                return pictures(variants, task, text, image, seed or 0, **sampling)

            for event in (button.click, text.submit):
                event(run(draw), [text, image, seed], results, concurrency_id="model", concurrency_limit=1)
        if all("caption" in model.tasks for model in models):
            with gradio.Tab("Ask"):
                image = gradio.Image(type="pil", label="picture")
                text = gradio.Textbox(QUESTION, label="question")
                button = gradio.Button("Ask", variant="primary")
                with gradio.Row():
                    results = [gradio.Textbox(label=label, lines=3) for label in labels]

            def ask(text: str, image: Any) -> Iterator[list[str]]:
                return answers(variants, text, image)

            for event in (button.click, text.submit):
                event(run(ask), [text, image], results, concurrency_id="model", concurrency_limit=1)
    return page


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "reca-trainer demo",
        description="Open a page on which a model and its adapters are compared, at http://127.0.0.1:7860 or, as "
        "GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say, elsewhere.",
    )
    parser.add_argument("base", nargs="?", help="folder or Hub id of a model (default: the embedded tiny BAGEL)")
    parser.add_argument("others", nargs="*", metavar="adapter", help="adapters of it, or models to compare with it")
    parser.add_argument("--load_in_4bit", action="store_true", help="NF4 weights, for small GPUs")
    parser.add_argument(
        "--sampling",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of generate_images, such as num_inference_steps=25 guidance_scale=4",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """`reca-trainer demo`: serve the page until it is stopped."""
    args = make_parser().parse_args(argv)
    sampling = (toy.SAMPLING if args.base is None else {}) | parse_sampling(args.sampling)
    make_page(load(args.base, args.others, args.load_in_4bit), sampling).launch(
        share=False, ssr_mode=False, css=STYLE, footer_links=["gradio"]
    )


if __name__ == "__main__":
    main(sys.argv[1:] or shlex.split(os.environ.get("RECA_DEMO", "")))
