"""`reca-trainer evaluate`: one model, one benchmark, one report.

Run it under `accelerate launch` to spread the work over several GPUs; the result does not depend on their number.
"""

from __future__ import annotations

import argparse
import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel

from reca_trainer.data import find_columns, load_image_dataset
from reca_trainer.evaluation import dpg, geneval, reconstruction, understanding
from reca_trainer.evaluation.generation import (
    Prompt,
    find_images,
    generate,
    processes,
    read_metadata,
    replacing,
    score_images,
)
from reca_trainer.evaluation.judge import EndpointJudge, LocalJudge
from reca_trainer.evaluation.report import Z, summarize, write_report
from reca_trainer.images import decode_image
from reca_trainer.models.auto import AutoUnifiedModel, AutoUnifiedProcessor
from reca_trainer.models.unified import UnifiedModel, UnifiedProcessor

DESCRIPTION = "Score a model on a benchmark. An interrupted run continues where it stopped when started again."


def make_parser(parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """The arguments of `reca-trainer evaluate`, added to `parser` if given."""
    parser = parser or argparse.ArgumentParser("reca-trainer evaluate", description=DESCRIPTION)
    parser.add_argument("--model", help="folder or Hub id of the model")
    parser.add_argument("--adapter", help="folder or Hub id of a PEFT adapter for it")
    parser.add_argument("--images", help="score the images of this folder instead of generating them")
    add_benchmark_arguments(parser, ("geneval", "dpg", "reconstruction", "understanding"))
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
    group.add_argument("--detector_revision", help="its commit on the Hub")
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


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse before hours of generation what would fail after them."""
    if args.benchmark == "geneval" and find_spec("scipy") is None:
        raise SystemExit("geneval needs SciPy for its detector: pip install 'reca-trainer[evaluation]'.")
    if args.benchmark == "dpg" and not (args.prompts and args.judge):
        raise SystemExit("dpg needs --prompts (its CSV file) and --judge.")
    if args.benchmark in ("reconstruction", "understanding") and not args.dataset:
        raise SystemExit(f"{args.benchmark} needs --dataset.")


def evaluate(
    args: argparse.Namespace,
    folder: str | Path,
    model: str | None = None,
    adapter: str | None = None,
    images: str | None = None,
) -> str:
    """Score `model` (with `adapter`), or the images of a folder, as `args` says; write everything into `folder`.

    Returns:
        The report in Markdown.
    """
    check_arguments(args)
    folder, sampling = Path(folder), parse_sampling(args.sampling)
    about = {"benchmark": args.benchmark, "model": model, "adapter": adapter, "dtype": args.dtype}
    if args.benchmark in ("reconstruction", "understanding"):
        return _evaluate_dataset(args, folder, about, sampling)
    all_prompts = geneval.prompts() if args.benchmark == "geneval" else dpg.read_prompts(args.prompts)
    prompts, count = spread(all_prompts, args.limit), args.images_per_prompt
    if images is None:
        images, settings = folder / "images", {name: about[name] for name in ("model", "adapter", "dtype")}
        unified, processor = load_model(model, adapter, args.dtype)
        generate(unified, processor, prompts, images, count, args.batch_size, args.seed, sampling, settings)
        del unified
        clear_device_cache(garbage_collection=True)
    else:
        count = None
        if args.benchmark == "geneval":
            found = read_metadata(images)
            prompts = spread([Prompt(name, data["prompt"], data) for name, data in found.items()], args.limit)
        elif any(Path(images).glob("*.png")):
            grids, images = images, folder / "images"
            if processes().is_main_process:
                dpg.read_grids(grids, prompts, images)
            processes().wait_for_everyone()
    scorer = _geneval(args) if args.benchmark == "geneval" else _dpg(args)
    rows = score_images(prompts, lambda prompt: find_images(images, prompt.id)[:count], scorer, folder, scorer.scorer)

    overall = "mean of categories" if args.benchmark == "geneval" else "mean of images"
    report = {
        **about,
        "images_from": str(images),
        "seed": args.seed,
        "sampling": sampling,
        "scorer": scorer.scorer,
        "overall_is": overall,
        **summarize(rows, overall),
        **(_geneval_text(scorer.scorer) if args.benchmark == "geneval" else _dpg_text(scorer.scorer, rows)),
    }
    if processes().is_main_process and args.grids:
        dpg.write_grids(images, prompts, args.grids)
    return _write(folder, report)


def load_model(model: str, adapter: str | None, dtype: str) -> tuple[UnifiedModel, UnifiedProcessor]:
    """A model, with its adapter if any, on this process's device."""
    processor = AutoUnifiedProcessor.from_pretrained(model)
    unified = AutoUnifiedModel.from_pretrained(model, dtype=dtype).to(processes().device).eval()
    if adapter is not None:
        unified = PeftModel.from_pretrained(unified, adapter).eval().get_base_model()
    return unified, processor


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


def _geneval(args: argparse.Namespace) -> geneval.GenEval:
    device = processes().device
    return geneval.GenEval(
        geneval.Detector(args.detector, args.detector_revision, device),
        geneval.ColorClassifier(args.color_classifier, args.color_classifier_revision, device),
    )


def _geneval_text(scorer: dict[str, Any]) -> dict[str, Any]:
    seen = " and ".join(
        f"{scorer[part]['name']} ({scorer[part]['revision'] or 'unversioned'})"
        for part in ("detector", "color_classifier")
    )
    note = (
        f"Detected and classified by {seen}. GenEval's published scores come from another detector (mmdetection's "
        "Mask2Former): these scores can be compared with each other, not with those of papers."
    )
    return {"title": "GenEval (other detector)", "notes": [note]}


def _dpg(args: argparse.Namespace) -> dpg.DPGBench:
    if args.judge_url:
        judge: Any = EndpointJudge(args.judge_url, args.judge)
    else:
        judge = LocalJudge(args.judge, args.judge_revision, processes().device, batch_size=args.batch_size)
    return dpg.DPGBench(judge, args.judge_instruction)


def _dpg_text(scorer: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    unreadable, asked = sum(row["unreadable"] for row in rows), sum(len(row["answers"]) for row in rows)
    notes = [
        f"Judged by {scorer['judge']['name']}. DPG-Bench's published scores come from mPLUG-large: scores of different "
        "judges cannot be compared."
    ]
    if unreadable:
        notes.append(f"{unreadable} of {asked} answers were neither yes nor no and counted as no.")
    return {"title": "DPG-Bench", "notes": notes}


def _evaluate_dataset(args: argparse.Namespace, folder: Path, about: dict[str, Any], sampling: dict[str, Any]) -> str:
    state = processes()
    dataset = load_image_dataset(args.dataset, args.dataset_split)
    column = find_columns(dataset).image
    chosen = spread(list(range(len(dataset))), args.limit)

    class Rows:
        """Decodes an image when it is looked at, so that a data set of any size fits."""

        def __len__(self) -> int:
            return len(chosen)

        def __getitem__(self, index: int) -> Any:
            row = dataset[chosen[index]]
            image = decode_image(row[column], f"image {chosen[index]} of {args.dataset}")
            return image if args.benchmark == "reconstruction" else {**row, "image": image}

    unified, processor = load_model(about["model"], about["adapter"], args.dtype)
    mine = range(state.process_index, len(chosen), state.num_processes)
    if args.benchmark == "reconstruction":
        rows = reconstruction.score_reconstructions(
            unified,
            processor,
            Rows(),
            mine,
            args.instruction,
            seed=args.seed,
            clip=reconstruction.ClipSimilarity(args.clip, device=state.device) if args.clip else None,
            lpips=reconstruction.load_lpips(state.device) if args.lpips else None,
            **sampling,
        )
    else:
        missing = {"question", "answer"} - set(dataset.column_names)
        if missing:
            raise ValueError(f"{args.dataset} lacks the columns {', '.join(sorted(missing))}.")
        rows = understanding.answer_questions(unified, processor, Rows(), mine, args.batch_size, **sampling)
    rows = sorted(gather_object(rows), key=lambda row: row["index"])
    if state.is_main_process:
        with replacing(folder / "results.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    report = {**about, "dataset": args.dataset, "seed": args.seed, "sampling": sampling, "notes": []}
    if args.benchmark == "understanding":
        scored = [{"id": str(row["index"]), "score": float(row["correct"]), "categories": {}} for row in rows]
        summary = summarize(scored, "mean of images")
        return _write(folder, {**report, "title": "Understanding", "overall_is": "share of right answers", **summary})
    means = {name: _mean([row[name] for row in rows]) for name in rows[0] if name != "index"}
    return _write(folder, {**report, "title": "Reconstruction", "images": len(rows), "means": means})


def _mean(values: list[float]) -> dict[str, float | None]:
    """Mean and standard error's 95 % margin, none for a single value."""
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    margin = Z * math.sqrt(squares / (len(values) - 1) / len(values)) if len(values) > 1 else None
    return {"mean": mean, "margin": margin}


def _write(folder: Path, report: dict[str, Any]) -> str:
    if not processes().is_main_process:
        return ""
    return write_report(folder, report)


if __name__ == "__main__":
    main()
