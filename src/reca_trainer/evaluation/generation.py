"""Generates the images of a benchmark and finds them again on disk.

The folder layout is GenEval's, for every benchmark: `<prompt id>/metadata.jsonl` holds the prompt and
`<prompt id>/samples/00000.png`, `00001.png`, … its images. Each image depends on the seed, its prompt and its number
only, so that a run may be interrupted, continued, extended by more images per prompt or spread over processes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig

from reca_trainer.adapters import read_quantization, unwrap
from reca_trainer.files import replacing
from reca_trainer.models.auto import AutoUnifiedModel, AutoUnifiedProcessor, resolve
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Prompt:
    """One prompt of a benchmark.

    Args:
        id: name of its folder, unique within the benchmark.
        text: what the model is asked to draw.
        metadata: what the benchmark needs to score it; written to and read from `metadata.jsonl`.
    """

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        if not self.id or Path(self.id).name != self.id or self.id in (".", ".."):
            raise ValueError(f"The prompt id {self.id!r} cannot be the name of a folder.")


def processes() -> PartialState:
    """The processes of this run and this one's device, also where there is no accelerator to find."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # Who is done waits for the others, on a continued run as long as they still have to draw.
    return PartialState(cpu=cpu, timeout=timedelta(days=7))


def load_model(
    model: str, adapter: str | None, dtype: str, load_in_4bit: bool = False
) -> tuple[UnifiedModel, UnifiedProcessor]:
    """A model, with its adapter if any, on this process's device and in eval mode.

    Args:
        load_in_4bit: NF4 weights as in a training with `--load_in_4bit`. The base of an adapter that was trained on a
            quantised base is quantised as it was there in any case.
    """
    options: dict[str, Any] = {"device_map": processes().device}  # tensor by tensor, and not by way of a whole copy
    if load_in_4bit and read_quantization(resolve(adapter or model))[0] is None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    if adapter is None:
        unified = unwrap(AutoUnifiedModel.from_pretrained(model, dtype=dtype, **options))
        processor = AutoUnifiedProcessor.from_pretrained(model)
    else:
        unified = unwrap(AutoUnifiedModel.from_pretrained(adapter, base_model=model, dtype=dtype, **options))
        processor = AutoUnifiedProcessor.from_pretrained(adapter, base_model=model)
    if not getattr(unified, "is_quantized", False):
        unified.to(processes().device)  # what an adapter adds; all else is there
    return unified.eval(), processor


def generate(
    model: UnifiedModel,
    processor: UnifiedProcessor,
    prompts: list[Prompt],
    folder: str | Path,
    images_per_prompt: int = 4,
    batch_size: int = 1,
    seed: int = 0,
    sampling: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    prompt_prefix: str = "",
) -> None:
    """Draw `images_per_prompt` images of each prompt into `folder`, leaving alone those already there.

    Under `accelerate launch` the batches are dealt out to the processes. A batch is always made of the same prompts,
    whatever is already there and however many processes run, so the images do not depend on either.

    Args:
        batch_size: images generated at once, each of another prompt.
        seed: with the prompt's id and the image's number it determines an image.
        sampling: passed to `generate_images`: `num_inference_steps`, `guidance_scale`, …
        settings: what else identifies the run (the model, its adapter, …); kept with the images.
        prompt_prefix: put before each prompt where it is handed to the model.

    Raises:
        ValueError: `folder` holds images of other prompts, of another seed or made with other settings.
    """
    folder, sampling, state = Path(folder), sampling or {}, processes()
    if state.is_main_process:
        settings = {**(settings or {}), "seed": seed, "sampling": sampling}
        _claim(folder, prompts, settings | ({"prompt_prefix": prompt_prefix} if prompt_prefix else {}))
    state.wait_for_everyone()

    batches = [
        (number, prompts[start : start + batch_size])
        for number in range(images_per_prompt)
        for start in range(0, len(prompts), batch_size)
    ]
    batches = batches[state.process_index :: state.num_processes]
    with tqdm(
        total=sum(len(batch) for _, batch in batches), desc="generate", unit="image", disable=not state.is_main_process
    ) as progress:
        for number, batch in batches:
            paths = [image_path(folder, prompt.id, number) for prompt in batch]
            if not all(path.exists() for path in paths):
                generators = [torch.Generator().manual_seed(image_seed(seed, p.id, number)) for p in batch]
                images = model.generate_images(
                    processor, text=[prompt_prefix + prompt.text for prompt in batch], generator=generators, **sampling
                )
                for path, image in zip(paths, images, strict=True):
                    if not path.exists():
                        with replacing(path) as temporary:
                            image.save(temporary, format="PNG")
            progress.update(len(batch))
    state.wait_for_everyone()


def image_path(folder: Path, prompt_id: str, number: int) -> Path:
    return folder / prompt_id / "samples" / f"{number:05}.png"


def image_seed(seed: int, prompt_id: str, number: int) -> int:
    """The seed of one image: independent of the list of prompts it is drawn with and of how many images there are."""
    digest = hashlib.sha256(json.dumps([seed, prompt_id, number]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _claim(folder: Path, prompts: list[Prompt], settings: dict[str, Any]) -> None:
    """Write down what is drawn in `folder`, or make sure that it is what was drawn there before."""
    record = folder / "generation.json"
    if record.exists():
        before = json.loads(record.read_text())
        settings = json.loads(json.dumps(settings))
        changed = [
            f"{name} was {before.get(name)!r}, is {settings.get(name)!r}"
            for name in sorted({*before, *settings})
            if before.get(name) != settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"{folder} holds images made otherwise ({'; '.join(changed)}). "
                "Use another folder, or delete this one to start over."
            )
    for prompt in prompts:
        line = json.dumps(prompt.metadata or {"prompt": prompt.text}, sort_keys=True, ensure_ascii=False) + "\n"
        metadata = folder / prompt.id / "metadata.jsonl"
        if metadata.exists() and metadata.read_text() != line:
            raise ValueError(f"{metadata} describes another prompt than {prompt.text!r}; use another folder.")
        (samples := folder / prompt.id / "samples").mkdir(parents=True, exist_ok=True)
        for left in samples.glob(".*.part"):  # by a run that was killed
            left.unlink()
        if not metadata.exists():
            with replacing(metadata) as temporary:
                temporary.write_text(line)
    if not record.exists():
        with replacing(record) as temporary:
            temporary.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def read_metadata(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The metadata of each prompt folder under `folder`, by folder name.

    Raises:
        ValueError: there is none, or a `metadata.jsonl` is not one JSON object; the message names it.
    """
    described = {}
    for path in sorted(Path(folder).glob("*/metadata.jsonl")):
        try:
            metadata = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not one JSON object on one line: {error}") from error
        if not isinstance(metadata, dict) or "prompt" not in metadata:
            raise ValueError(f"{path} lacks \"prompt\"; GenEval's layout keeps the prompt's description there.")
        described[path.parent.name] = metadata
    if not described:
        raise ValueError(f"{folder} holds no <prompt>/metadata.jsonl: it is no folder of generated images.")
    return described


def find_images(folder: str | Path, prompt_id: str) -> list[Path]:
    """The images of one prompt, in order of their names.

    Raises:
        ValueError: there is none.
    """
    samples = Path(folder) / prompt_id / "samples"
    paths = sorted(path for path in samples.glob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{samples} holds no image; generate it first.")
    return paths


def score_images(
    prompts: list[Prompt],
    images_of: Callable[[Prompt], list[Path]],
    score: Callable[[Prompt, list[Path]], list[dict[str, Any]]],
    folder: str | Path,
    scorer: dict[str, Any],
) -> list[dict[str, Any]]:
    """Score all images, prompt by prompt, and return one row per image in the order of `prompts`.

    Rows are kept in `folder`/scores, so that an interrupted run continues; `folder`/results.jsonl holds all of them in
    the end. Under `accelerate launch` the prompts are dealt out to the processes, and every process returns all rows.

    Args:
        score: gives the rows of one prompt's images. Each needs `score` in [0, 1] and `categories`, the sums and weights
            that go into the named scores of the report: `{name: [sum, weight]}`; `measures`, `{name: value}` of what is no
            share, may join them.
        scorer: what the scores depend on besides the image (detector, judge, …). Rows of another scorer are redone.
    """
    folder, state = Path(folder), processes()
    scorer = json.loads(json.dumps(scorer))
    mine = prompts[state.process_index :: state.num_processes]
    for prompt in tqdm(mine, desc="score", unit="prompt", disable=not state.is_main_process):
        paths, kept = images_of(prompt), folder / "scores" / f"{prompt.id}.json"
        seen = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in paths]
        if kept.exists():
            before = json.loads(kept.read_text())
            if before["scorer"] == scorer and before["images"] == seen:
                continue
        rows = [
            {"id": prompt.id, "filename": os.path.relpath(path, folder), "prompt": prompt.text, **row}
            for path, row in zip(paths, score(prompt, paths), strict=True)
        ]
        with replacing(kept) as temporary:
            temporary.write_text(json.dumps({"scorer": scorer, "images": seen, "rows": rows}))
    state.wait_for_everyone()
    rows = [row for p in prompts for row in json.loads((folder / "scores" / f"{p.id}.json").read_text())["rows"]]
    if state.is_main_process:
        with replacing(folder / "results.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    state.wait_for_everyone()
    return rows


def batched(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def parse_value(value: Any) -> Any:
    """What a string says: JSON where it is (`"[0.0, 1.0]"` → `[0.0, 1.0]`), else itself. No string stays what it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
