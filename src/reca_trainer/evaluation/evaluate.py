"""`reca-trainer evaluate`: one model, one benchmark, one report.

On several GPUs: `accelerate launch -m reca_trainer.cli evaluate …`; the result does not depend on their number.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache

from reca_trainer.adapters import unwrap
from reca_trainer.data import find_columns, load_image_dataset
from reca_trainer.evaluation import dpg, geneval, reconstruction, understanding
from reca_trainer.evaluation.generation import (
    Prompt,
    find_images,
    generate,
    processes,
    read_metadata,
    score_images,
)
from reca_trainer.evaluation.judge import EndpointJudge, LocalJudge
from reca_trainer.evaluation.report import Overall, Z, summarize, write_report
from reca_trainer.files import replacing
from reca_trainer.images import decode_image
from reca_trainer.models.auto import AutoUnifiedModel, AutoUnifiedProcessor
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor

DESCRIPTION = """Score a model on a benchmark. An interrupted run of geneval or dpg continues where it stopped when started
again. On several GPUs: accelerate launch -m reca_trainer.cli evaluate ..."""


def make_parser(parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """The arguments of `reca-trainer evaluate`, added to `parser` if given."""
    parser = parser or argparse.ArgumentParser("reca-trainer evaluate", description=DESCRIPTION)
    parser.add_argument("--model", help="folder or Hub id of the model")
    parser.add_argument("--adapter", help="folder or Hub id of a PEFT adapter for it")
    parser.add_argument("--images", help="score the images of this folder instead of generating them")
    add_benchmark_arguments(parser, tuple(BENCHMARKS))
    return parser


def add_benchmark_arguments(parser: argparse.ArgumentParser, benchmarks: tuple[str, ...]) -> None:
    """The arguments that say what is measured and how, shared with `reca-trainer compare`."""
    parser.add_argument("--benchmark", required=True, choices=benchmarks)
    parser.add_argument("--output_dir", required=True, help="where images, results.jsonl and the report go")
    parser.add_argument("--limit", type=int, help="use only so many prompts, images or questions, spread evenly")
    parser.add_argument(
        "--batch_size", type=int, default=1, help="images generated, or questions answered, at once (default 1)"
    )
    parser.add_argument("--images_per_prompt", type=int, default=4, help="default 4, as GenEval and DPG-Bench publish")
    parser.add_argument("--seed", type=int, default=0, help="determines, with prompt and number, every image")
    parser.add_argument("--dtype", default="bfloat16", help="of the model's weights (default bfloat16)")
    parser.add_argument(
        "--sampling",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="passed to generate_images (generate_text for understanding), such as num_inference_steps=50",
    )
    group = parser.add_argument_group("geneval")
    group.add_argument("--detector", default=geneval.DETECTOR, help="a Mask2Former for COCO instances (%(default)s)")
    group.add_argument("--detector_revision", help="its commit on the Hub (pinned for the default)")
    group.add_argument("--color_classifier", default=geneval.COLOR_CLASSIFIER, help="a CLIP model (%(default)s)")
    group.add_argument("--color_classifier_revision", help="its commit on the Hub (pinned for the default)")
    group = parser.add_argument_group("dpg")
    group.add_argument("--prompts", help="DPG-Bench's CSV file, or a Hub dataset with its columns")
    group.add_argument("--judge", help="a transformers image-text-to-text model, or a model's name at --judge_url")
    group.add_argument("--judge_revision", help="its commit on the Hub")
    group.add_argument("--judge_url", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    group.add_argument("--judge_instruction", default=dpg.INSTRUCTION, help="added to each question (%(default)s)")
    group.add_argument("--grids", help="also write 2 × 2 grids, as the original scorer reads them, to this folder")
    group = parser.add_argument_group("reconstruction, understanding")
    group.add_argument("--dataset", help="folder or Hub id of images (understanding: image, question, answer)")
    group.add_argument("--dataset_split", default="train", help="default train")
    group.add_argument("--instruction", default=reconstruction.INSTRUCTION, help="of the reconstruction (%(default)s)")
    group.add_argument("--clip", help="a CLIP model for the similarity of image and reconstruction")
    group.add_argument("--lpips", action="store_true", help="LPIPS as well; needs torchvision")


def main(argv: list[str] | None = None) -> None:
    """Run `reca-trainer evaluate`."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if (args.model is None) == (args.images is None):
        parser.error("give either --model or --images")
    if args.images and args.benchmark not in ("geneval", "dpg"):
        parser.error(f"{args.benchmark} needs a --model; it does not score images made elsewhere")
    text = evaluate(args, args.output_dir, args.model, args.adapter, args.images)
    if processes().is_main_process:
        print(text)


def evaluate(
    args: argparse.Namespace,
    folder: str | Path,
    model: str | None = None,
    adapter: str | None = None,
    images: str | None = None,
) -> str:
    """Score `model` (with `adapter`), or the images of a folder, as `args` says; write everything into `folder`.

    Returns:
        The report in Markdown, on the main process.
    """
    folder, run = Path(folder), BENCHMARKS[args.benchmark]
    about = {"benchmark": args.benchmark, "model": model, "adapter": adapter, "dtype": args.dtype}
    about |= {"seed": args.seed, "sampling": parse_sampling(args.sampling)}
    report = {**about, **run(args, folder, about, images)}
    return write_report(folder, report) if processes().is_main_process else ""


def _geneval(args: argparse.Namespace, folder: Path, about: dict[str, Any], images: str | None) -> dict[str, Any]:
    if find_spec("scipy") is None:  # before hours of generation
        raise SystemExit("geneval needs SciPy for its detector: pip install 'reca-trainer[evaluation]'.")
    if images is None:
        prompts = spread(geneval.prompts(), args.limit)
        images_of = _draw(args, prompts, folder, about)
    else:
        metadata = read_metadata(images)
        prompts = spread([Prompt(name, one["prompt"], one) for name, one in metadata.items()], args.limit)
        images_of = _find(images)
    device = processes().device
    scorer = geneval.GenEval(
        geneval.Detector(args.detector, args.detector_revision, device),
        geneval.ColorClassifier(args.color_classifier, args.color_classifier_revision, device),
    )
    rows = score_images(prompts, images_of, scorer, folder, scorer.scorer)
    models = (scorer.detector.source, scorer.color_classifier.source)
    seen_by = " and ".join(f"{one['name']} ({one['revision'] or 'unversioned'})" for one in models)
    note = (
        f"Detected and classified by {seen_by}. GenEval's published scores come from another detector (mmdetection's "
        "Mask2Former): these scores can be compared with each other, not with those of papers."
    )
    return _summary("GenEval (other detector)", scorer.scorer, rows, "mean of categories", [note])


def _dpg(args: argparse.Namespace, folder: Path, about: dict[str, Any], images: str | None) -> dict[str, Any]:
    if not (args.prompts and args.judge):
        raise SystemExit("dpg needs --prompts (its CSV file) and --judge.")
    prompts = spread(dpg.read_prompts(args.prompts), args.limit)
    if images is None:
        images_of = _draw(args, prompts, folder, about)
    elif any(Path(images).glob("*.png")):
        if processes().is_main_process:
            dpg.read_grids(images, prompts, folder / "images")
        processes().wait_for_everyone()
        images_of = _find(folder / "images")
    else:
        images_of = _find(images)
    if args.grids and processes().is_main_process:
        dpg.write_grids(prompts, images_of, args.grids)
    if args.judge_url:
        judge: Any = EndpointJudge(args.judge_url, args.judge)
    else:
        judge = LocalJudge(args.judge, args.judge_revision, processes().device, batch_size=args.batch_size)
    scorer = dpg.DPGBench(judge, args.judge_instruction)
    rows = score_images(prompts, images_of, scorer, folder, scorer.scorer)
    notes = [
        f"Judged by {judge.source['name']}. DPG-Bench's published scores come from mPLUG-large: scores of different "
        "judges cannot be compared."
    ]
    if unreadable := sum(row["unreadable"] for row in rows):
        asked = sum(len(row["answers"]) for row in rows)
        notes.append(f"{unreadable} of {asked} answers were neither yes nor no and counted as no.")
    return _summary("DPG-Bench", scorer.scorer, rows, "mean of images", notes)


def _draw(
    args: argparse.Namespace, prompts: list[Prompt], folder: Path, about: dict[str, Any]
) -> Callable[[Prompt], list[Path]]:
    """Generate the images, then give the model's memory back to whatever looks at them."""
    images, count = folder / "images", args.images_per_prompt
    settings = {name: about[name] for name in ("model", "adapter", "dtype")}
    model, processor = load_model(about["model"], about["adapter"], args.dtype)
    generate(model, processor, prompts, images, count, args.batch_size, args.seed, about["sampling"], settings)
    del model
    clear_device_cache(garbage_collection=True)
    return _find(images, count)


def _find(images: str | Path, count: int | None = None) -> Callable[[Prompt], list[Path]]:
    return lambda prompt: find_images(images, prompt.id)[:count]


def _summary(
    title: str, scorer: dict[str, Any], rows: list[dict[str, Any]], overall: Overall, notes: list[str]
) -> dict[str, Any]:
    return {"title": title, "scorer": scorer, "overall_is": overall, **summarize(rows, overall), "notes": notes}


def _reconstruction(args: argparse.Namespace, folder: Path, about: dict[str, Any], images: None) -> dict[str, Any]:
    dataset, state = _Rows(args, images_only=True), processes()
    rows = reconstruction.score_reconstructions(
        *load_model(about["model"], about["adapter"], args.dtype),
        dataset,
        range(state.process_index, len(dataset), state.num_processes),
        args.instruction,
        seed=args.seed,
        clip=reconstruction.ClipSimilarity(args.clip, device=state.device) if args.clip else None,
        lpips=reconstruction.load_lpips(state.device) if args.lpips else None,
        **about["sampling"],
    )
    rows = _gather(folder, rows)
    means = {name: _mean([row[name] for row in rows]) for name in rows[0] if name != "index"}
    return {"title": "Reconstruction", "dataset": args.dataset, "images": len(rows), "means": means, "notes": []}


def _understanding(args: argparse.Namespace, folder: Path, about: dict[str, Any], images: None) -> dict[str, Any]:
    dataset, state = _Rows(args, "question", "answer"), processes()
    rows = understanding.answer_questions(
        *load_model(about["model"], about["adapter"], args.dtype),
        dataset,
        range(state.process_index, len(dataset), state.num_processes),
        args.batch_size,
        **about["sampling"],
    )
    rows = _gather(folder, rows)
    scored = [{"id": str(row["index"]), "score": float(row["correct"]), "categories": {}} for row in rows]
    summary = {"dataset": args.dataset, "overall_is": "share of right answers", **summarize(scored, "mean of images")}
    return {"title": "Understanding", **summary, "notes": []}


class _Rows:
    """The rows of `--dataset`, decoded when they are looked at, so that it may be of any size."""

    def __init__(self, args: argparse.Namespace, *columns: str, images_only: bool = False):
        if not args.dataset:
            raise SystemExit(f"{args.benchmark} needs --dataset.")
        self.name, self.dataset = args.dataset, load_image_dataset(args.dataset, args.dataset_split)
        missing = set(columns) - set(self.dataset.column_names)
        if missing:
            raise ValueError(f"{args.dataset} lacks the columns {', '.join(sorted(missing))}.")
        self.column, self.images_only = find_columns(self.dataset).image, images_only
        self.chosen = spread(list(range(len(self.dataset))), args.limit)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Any:
        row = self.dataset[self.chosen[index]]
        image = decode_image(row[self.column], f"image {self.chosen[index]} of {self.name}")
        return image if self.images_only else {**row, "image": image}


def _gather(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all processes in the order of the data set, also kept in `results.jsonl`."""
    rows = sorted(gather_object(rows), key=lambda row: row["index"])
    if processes().is_main_process:
        with replacing(folder / "results.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def _mean(values: list[float]) -> dict[str, float | None]:
    """Mean and the 95 % margin of its standard error, none for a single value."""
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    margin = Z * math.sqrt(squares / (len(values) - 1) / len(values)) if len(values) > 1 else None
    return {"mean": mean, "margin": margin}


BENCHMARKS = {
    "geneval": _geneval,
    "dpg": _dpg,
    "reconstruction": _reconstruction,
    "understanding": _understanding,
}


def load_model(model: str, adapter: str | None, dtype: str) -> tuple[UnifiedModel, UnifiedProcessor]:
    """A model, with its adapter if any, on this process's device."""
    if adapter is None:
        unified, processor = (
            AutoUnifiedModel.from_pretrained(model, dtype=dtype),
            AutoUnifiedProcessor.from_pretrained(model),
        )
    else:
        unified = unwrap(AutoUnifiedModel.from_pretrained(adapter, base_model=model, dtype=dtype))
        processor = AutoUnifiedProcessor.from_pretrained(adapter, base_model=model)
    if not getattr(unified, "is_quantized", False):  # the loader has placed quantised weights
        unified.to(processes().device)
    return unified.eval(), processor


def parse_sampling(pairs: list[str]) -> dict[str, Any]:
    """`["height=512", "name=value"]` → `{"height": 512, "name": "value"}`: JSON where it is, else a string."""
    sampling = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise SystemExit(f"--sampling takes NAME=VALUE, not {pair!r}.")
        try:
            sampling[name] = json.loads(value)
        except ValueError:
            sampling[name] = value
    return sampling


def spread(items: list[Any], limit: int | None) -> list[Any]:
    """`limit` of the items at even distances, so that every category of an ordered benchmark is among them."""
    if limit is None or limit >= len(items):
        return items
    return [items[index * len(items) // limit] for index in range(limit)]


if __name__ == "__main__":
    main()
