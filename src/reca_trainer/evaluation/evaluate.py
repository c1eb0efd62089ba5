"""One model, one benchmark, one report, whatever the number of processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache

from reca_trainer.data import find_columns, load_image_dataset
from reca_trainer.evaluation import dpg, geneval, reconstruction, understanding
from reca_trainer.evaluation.arguments import EvaluationArguments
from reca_trainer.evaluation.generation import (
    Prompt,
    find_images,
    generate,
    load_model,
    processes,
    read_metadata,
    score_images,
)
from reca_trainer.evaluation.image_scores import LAB, ClipSimilarity, diversity, load_lpips, mean_lab
from reca_trainer.evaluation.judge import LocalJudge
from reca_trainer.evaluation.protocols import Protocol, find_protocol
from reca_trainer.evaluation.report import Overall, mean_and_margin, summarize, summarize_measures, write_report
from reca_trainer.files import replacing
from reca_trainer.images import decode_image
from reca_trainer.models.contract import UnifiedModel, UnifiedProcessor

Report = dict[str, Any]


def evaluate(args: EvaluationArguments) -> str:
    """Score a model, or the images of a folder, and write everything into `args.output_dir`.

    An interrupted run of geneval or dpg continues where it stopped when it is started again. Under `accelerate launch`
    every process calls this; the result does not depend on their number.

    Returns:
        The report in Markdown on the main process, "" on the others.

    Raises:
        ValueError: what is to be read does not fit the benchmark, or there is no such protocol.
        ImportError: the benchmark needs a package that is not installed.
    """
    _check_packages(args)
    names = ("benchmark", "model", "adapter", "dtype", "load_in_4bit", "seed", "protocol", "sampling")
    report = {name: getattr(args, name) for name in names} | BENCHMARKS[args.benchmark](args)
    return write_report(args.output_dir, report) if processes().is_main_process else ""


def _check_packages(args: EvaluationArguments) -> None:
    """Name a package that is missing now, and not after hours of generation."""
    for package, needed, extra in (
        ("scipy", args.benchmark == "geneval", "evaluation"),
        ("httpx2", args.benchmark == "dpg", "evaluation"),
        ("torchmetrics", args.benchmark == "reconstruction" or args.lpips, "evaluation"),
        ("torchvision", args.lpips, "lpips"),
        ("httpx2", args.judge_url is not None, "evaluation"),
        ("lmms_eval", args.benchmark == "understanding" and args.dataset is None, "lmms"),
    ):
        if needed and find_spec(package) is None:
            raise ImportError(f"{args.benchmark} needs {package}: pip install 'reca-trainer[{extra}]'.")


def _geneval(args: EvaluationArguments) -> Report:
    generation: Report = {}
    if args.images is None:
        prompts = geneval.prompts() if args.prompts_file is None else geneval.read_prompts(args.prompts_file)
        prompts = spread(prompts, args.limit)
        images_of, generation = _draw(args, prompts)
    else:
        described = read_metadata(args.images)
        prompts = [Prompt(name, metadata["prompt"], metadata) for name, metadata in described.items()]
        prompts, images_of = spread(prompts, args.limit), _find(args.images)
    device = processes().device
    scorer = geneval.GenEval(
        geneval.Detector(args.detector, args.detector_revision, device),
        geneval.ColorClassifier(args.color_classifier, args.color_classifier_revision, device),
    )
    rows, described = _score(args, prompts, images_of, scorer)
    models = (scorer.detector.source, scorer.color_classifier.source)
    seen_by = " and ".join(f"{model['name']} ({model['revision'] or 'unversioned'})" for model in models)
    note = (
        f"Detected and classified by {seen_by}. GenEval's published scores come from another detector (mmdetection's "
        "Mask2Former): these scores can be compared with each other, not with those of papers."
    )
    notes = [note, *_made_by(args, generation)]
    return _summary("GenEval (other detector)", described, rows, "mean of categories", notes, generation)


def _dpg(args: EvaluationArguments) -> Report:
    prompts = spread(dpg.read_prompts(args.prompts), args.limit)
    judge: Any = None
    if args.judge_url:
        from reca_trainer.evaluation.endpoint_judge import EndpointJudge  # needs httpx2

        judge = EndpointJudge(args.judge_url, args.judge)
    generation: Report = {}
    if args.images is None:
        images_of, generation = _draw(args, prompts)
    elif dpg.find_grids(args.images):
        cut = Path(args.output_dir) / "images"
        if processes().is_main_process:
            dpg.read_grids(args.images, prompts, cut)
        processes().wait_for_everyone()
        images_of = _find(cut)
    else:
        images_of = _find(args.images)
    if args.grids and processes().is_main_process:
        dpg.write_grids(prompts, images_of, args.grids)
    if judge is None:
        judge = LocalJudge(args.judge, args.judge_revision, processes().device, batch_size=args.batch_size)
    scorer = dpg.DPGBench(judge, args.judge_instruction)
    rows, described = _score(args, prompts, images_of, scorer)
    notes = [
        f"Judged by {judge.source['name']}. DPG-Bench's published scores come from mPLUG-large: scores of different "
        "judges cannot be compared."
    ]
    if unreadable := sum(row["unreadable"] for row in rows):
        asked = sum(len(row["answers"]) for row in rows)
        notes.append(f"{unreadable} of {asked} answers were neither yes nor no and counted as no.")
    notes += _made_by(args, generation)
    return _summary("DPG-Bench", described, rows, "mean of images", notes, generation)


def _score(
    args: EvaluationArguments,
    prompts: list[Prompt],
    images_of: Callable[[Prompt], list[Path]],
    scorer: geneval.GenEval | dpg.DPGBench,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of all images, with what needs no judge: their mean colour and the diversity of each prompt's images.

    Returns:
        The rows, and what they depend on besides the images.
    """
    clip, lpips = _similarities(args)
    described = scorer.scorer | {name: getattr(args, name) for name in ("clip", "lpips") if getattr(args, name)}

    def score(prompt: Prompt, paths: list[Path]) -> list[dict[str, Any]]:
        images = [decode_image(path) for path in paths]
        spread_of_all = diversity(images, clip, lpips)
        colors = [{f"lab_{axis}": float(v) for axis, v in zip(LAB, mean_lab(image), strict=True)} for image in images]
        rows = scorer(prompt, paths)
        return [row | {"measures": color | spread_of_all} for row, color in zip(rows, colors, strict=True)]

    return score_images(prompts, images_of, score, args.output_dir, described), described


def _similarities(args: EvaluationArguments) -> tuple[ClipSimilarity | None, torch.nn.Module | None]:
    device = processes().device
    return ClipSimilarity(args.clip, device=device) if args.clip else None, load_lpips(device) if args.lpips else None


def _draw(args: EvaluationArguments, prompts: list[Prompt]) -> tuple[Callable[[Prompt], list[Path]], Report]:
    """Generate the images, then give the model's memory back to whatever looks at them.

    Returns:
        Where the images of a prompt are, and how they were made.
    """
    model, processor = _load(args)
    protocol = _protocol(args, model)
    count = protocol.images_per_prompt if args.images_per_prompt is None else args.images_per_prompt
    sampling = {**protocol.sampling, **args.sampling}
    settings = {name: getattr(args, name) for name in ("model", "adapter", "dtype")}
    settings |= {"load_in_4bit": True} if args.load_in_4bit else {}
    folder = Path(args.output_dir) / "images"
    generate(
        model,
        processor,
        prompts,
        folder,
        count,
        args.batch_size,
        args.seed,
        sampling,
        settings,
        prompt_prefix=protocol.prompt_prefix,
    )
    del model
    clear_device_cache(garbage_collection=True)
    made = {"images_per_prompt": count, "prompt_prefix": protocol.prompt_prefix, "sampling": sampling}
    return _find(folder, count), {**made, "source": protocol.source}


def _load(args: EvaluationArguments) -> tuple[UnifiedModel, UnifiedProcessor]:
    return load_model(args.model, args.adapter, args.dtype, args.load_in_4bit)


def _protocol(args: EvaluationArguments, model: UnifiedModel) -> Protocol:
    return find_protocol(args.protocol, args.benchmark, model.config.model_type)


def _find(images: str | Path, count: int | None = None) -> Callable[[Prompt], list[Path]]:
    return lambda prompt: find_images(images, prompt.id)[:count]


def _summary(
    title: str,
    scorer: dict[str, Any],
    rows: list[dict[str, Any]],
    overall: Overall,
    notes: list[str],
    generation: Report,
) -> Report:
    about = {"title": title, "generation": generation, "scorer": scorer, "overall_is": overall}
    means = summarize_measures(rows)
    notes = [*notes, COLOR_NOTE] if "lab_b" in means else notes
    return {**about, **summarize(rows, overall), "means": means, "notes": notes}


# What the measures mean, for whoever reads a report.
COLOR_NOTE = (
    "lab_l, lab_a and lab_b are the images' mean colour in CIE Lab: lightness, green to red, blue to yellow. Against the same "
    "images of another model they tell a colour cast."
)
CAST_NOTE = (
    "lab_shift_l, lab_shift_a and lab_shift_b are the reconstructions' mean colour in CIE Lab less that of the inputs: lighter, "
    "redder, yellower where positive."
)


def _made_by(args: EvaluationArguments, generation: Report) -> list[str]:
    """What a reader must know of images that were made by a protocol."""
    if generation.get("source") is None:
        return []
    options = [name for name in ("images_per_prompt", "instruction") if getattr(args, name) is not None]
    given = [name for name in options if name in generation] + list(args.sampling)
    values = {name: value for name, value in generation.items() if name != "source" and value}
    values |= values.pop("sampling")
    but = f", but for {', '.join(given)}" if given else ""
    listed = ", ".join(f"{name}={value!r}" for name, value in values.items())
    return [f"Sampled by the protocol of RecA's authors ({generation['source']}{but}): {listed}."]


def _reconstruction(args: EvaluationArguments) -> Report:
    dataset, state = _Rows(args, images_only=True), processes()
    clip, lpips = _similarities(args)
    model, processor = _load(args)
    protocol = _protocol(args, model)
    instruction = args.instruction
    if instruction is None:
        instruction = reconstruction.INSTRUCTION if protocol.instruction is None else protocol.instruction
    sampling = {**protocol.sampling, **args.sampling}
    rows = reconstruction.score_reconstructions(
        model,
        processor,
        dataset,
        range(state.process_index, len(dataset), state.num_processes),
        instruction,
        seed=args.seed,
        clip=clip,
        lpips=lpips,
        **sampling,
    )
    rows = _gather(args.output_dir, rows)
    generation = {"instruction": instruction, "sampling": sampling, "source": protocol.source}
    about = {"title": "Reconstruction", "generation": generation, "dataset": args.dataset, "images": len(rows)}
    means = {name: mean_and_margin([row[name] for row in rows]) for name in rows[0] if name != "index"}
    return {**about, "means": means, "notes": [CAST_NOTE, *_made_by(args, generation)]}


def _understanding(args: EvaluationArguments) -> Report:
    if args.dataset is None:
        return _tasks(args)
    dataset, state = _Rows(args, "question", "answer"), processes()
    rows = understanding.answer_questions(
        *_load(args),
        dataset,
        range(state.process_index, len(dataset), state.num_processes),
        args.batch_size,
        **args.sampling,
    )
    rows = _gather(args.output_dir, rows)
    scored = [{"id": str(row["index"]), "score": float(row["correct"]), "categories": {}} for row in rows]
    summary = {"dataset": args.dataset, "overall_is": "share of right answers", **summarize(scored, "mean of images")}
    return {"title": "Understanding", **summary, "notes": []}


def _tasks(args: EvaluationArguments) -> Report:
    means, version = understanding.score_tasks(
        args.model,
        args.tasks,
        args.limit,
        adapter=args.adapter,
        dtype=args.dtype,
        load_in_4bit=args.load_in_4bit,
        batch_size=args.batch_size,
        **args.sampling,
    )
    asked = "" if args.limit is None else f" Only the first {args.limit} questions of each task were asked."
    about = {"title": "Understanding", "scorer": {"tasks": args.tasks, "lmms_eval": version, "limit": args.limit}}
    return {**about, "means": means, "notes": [f"Asked and scored by lmms-eval {version}.{asked}"]}


class _Rows:
    """The rows of `--dataset`, decoded when they are looked at, so that it may be of any size."""

    def __init__(self, args: EvaluationArguments, *columns: str, images_only: bool = False):
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


def _gather(folder: str | Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all processes in the order of the data set, also kept in `results.jsonl`."""
    rows = sorted(gather_object(rows), key=lambda row: row["index"])
    if processes().is_main_process:
        with replacing(Path(folder) / "results.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


BENCHMARKS = {
    "geneval": _geneval,
    "dpg": _dpg,
    "reconstruction": _reconstruction,
    "understanding": _understanding,
}


def spread(items: list[Any], limit: int | None) -> list[Any]:
    """`limit` of the items at even distances, so that every category of an ordered benchmark is among them."""
    if limit is None or limit >= len(items):
        return items
    return [items[index * len(items) // limit] for index in range(limit)]
