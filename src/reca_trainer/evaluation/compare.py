"""Several models on one benchmark with the same seeds, side by side."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.utils.peft_utils import find_adapter_config_file

from reca_trainer.evaluation.arguments import BenchmarkArguments, ComparisonArguments, EvaluationArguments
from reca_trainer.evaluation.evaluate import evaluate
from reca_trainer.evaluation.generation import processes
from reca_trainer.evaluation.report import compare_measures, compare_rows, interval, mean_interval, percent
from reca_trainer.files import replacing
from reca_trainer.images import decode_image
from reca_trainer.saving.card import escaped

# What must agree for a difference between two runs to be one between the models.
CONDITIONS = ("benchmark", "seed", "protocol", "sampling", "scorer")
DEFAULTS = {"protocol": "default"}  # of reports that do not say


def compare(models: Sequence[str], args: ComparisonArguments) -> str:
    """Run a benchmark on several models with the same seeds, and compare them with the first.

    Args:
        models: folder or Hub id of a model, of an adapter of the first, or a folder that `evaluate` wrote to.

    Returns:
        The table in Markdown on the main process, "" on the others; see `compare_runs` for what is written.

    Raises:
        ValueError: there are fewer than two models, or runs that cannot be compared.
    """
    if len(models) < 2:
        raise ValueError("there is nothing to compare: give at least two models.")
    runs = [_run(models, number, args) for number in range(len(models))]
    return compare_runs(runs, args.output_dir, args.thumbnail) if processes().is_main_process else ""


def _run(models: Sequence[str], number: int, args: ComparisonArguments) -> Path:
    """The results of one of the models, made now unless they are there."""
    name = models[number]
    if (Path(name) / "report.json").is_file():
        return Path(name)
    folder = Path(args.output_dir) / f"{number}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('-.')[-60:]}"
    is_adapter = number > 0 and find_adapter_config_file(name) is not None
    options = {option.name: getattr(args, option.name) for option in fields(BenchmarkArguments)}
    options |= {"model": models[0], "adapter": name} if is_adapter else {"model": name}
    evaluate(EvaluationArguments(**options | {"output_dir": str(folder)}))
    return folder


def compare_runs(runs: Sequence[str | Path], folder: str | Path, thumbnail: int = 224) -> str:
    """Compare what `evaluate` wrote of several models with the first of them.

    Writes `compare.json`, `compare.md` (for a model card) and, of benchmarks that look at images, `compare.html`, one file
    with the images in it. Only images inside a run's folder are shown: a results file could name any other file of
    this machine.

    Args:
        runs: the folders.
        folder: where the comparison goes.
        thumbnail: longest side of the images in the page, in pixels.

    Returns:
        The table in Markdown.

    Raises:
        ValueError: the runs differ in seed, protocol, sampling, detector or judge, or are not about the same images.
    """
    folder, runs = Path(folder), [Path(run) for run in runs]
    reports = [json.loads((run / "report.json").read_text()) for run in runs]
    for run, report in zip(runs[1:], reports[1:], strict=True):
        for name in CONDITIONS:
            here, there = (conditions.get(name, DEFAULTS.get(name)) for conditions in (report, reports[0]))
            if here != there:
                raise ValueError(f"{run} has {name} {here!r}, {runs[0]} has {there!r}.")
    names = _names(reports, runs)
    rows: list[list[dict[str, Any]]] = []
    if "overall" in reports[0]:
        rows = [[json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()] for run in runs]
        if "filename" not in rows[0][0]:
            raise ValueError(
                f"{runs[0]} holds answers to questions of your own; compare reads images and tasks of lmms-eval."
            )
        differences = [
            compare_rows(rows[0], other, reports[0]["overall_is"]) | {"means": compare_measures(rows[0], other)}
            for other in rows[1:]
        ]
    else:
        differences = [{"means": _unpaired(reports[0]["means"], report["means"])} for report in reports[1:]]
    text = _table(names, reports, differences)
    result = {"names": names, "runs": [str(run) for run in runs], "differences": differences}
    for name, content in (("compare.json", json.dumps(result, indent=2) + "\n"), ("compare.md", text)):
        with replacing(folder / name) as temporary:
            temporary.write_text(content)
    if rows:
        with replacing(folder / "compare.html") as temporary, open(temporary, "w", encoding="utf-8") as page:
            page.writelines(_page(names, reports, differences, runs, rows, thumbnail))
    return text


def _unpaired(base: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`other` minus `base`, as if different questions had been asked: the margin is rather too wide."""
    result = {}
    for name in (name for name in base if name in other):
        margins = base[name]["margin"], other[name]["margin"]
        margin = None if None in margins else math.hypot(*margins)
        result[name] = {"mean": other[name]["mean"] - base[name]["mean"], "margin": margin}
    return result


def _names(reports: list[dict[str, Any]], runs: list[Path]) -> list[str]:
    """What the models are called: the adapter's or model's last name, told apart by the folder if need be."""
    names = [
        Path(report["adapter"] or report["model"] or run.name).name for report, run in zip(reports, runs, strict=True)
    ]
    return (
        names if len(set(names)) == len(names) else [f"{name} ({run})" for name, run in zip(names, runs, strict=True)]
    )


def _cells(reports: list[dict[str, Any]], differences: list[dict[str, Any]]) -> Iterator[list[str]]:
    """The rows of the table: name, the base's score, and per other model its score and the difference."""
    yield from _shares(reports, differences) if "overall" in reports[0] else ()
    for name in reports[0].get("means", {}):
        if all(name in difference["means"] for difference in differences):
            cells = [name, _mean(reports[0]["means"][name])]
            for report, difference in zip(reports[1:], differences, strict=True):
                cells += [_mean(report["means"][name]), _mean(difference["means"][name], "+")]
            yield cells


def _mean(score: dict[str, Any], sign: str = "") -> str:
    around = mean_interval(**score)
    return f"{score['mean']:{sign}.4g}" + (f" ({around})" if around else "")


def _shares(reports: list[dict[str, Any]], differences: list[dict[str, Any]]) -> Iterator[list[str]]:
    """The cells of scores in percent, whose differences are paired."""

    def of(result: dict[str, Any], name: str) -> dict[str, float]:
        return result["overall"] if name == "overall" else result["categories"][name]

    for name in ("overall", *reports[0]["categories"]):
        first, *others = (of(report, name) for report in reports)
        cells = [name, f"{percent(first['score'])} ({interval(first)})"]
        for other, difference in zip(others, differences, strict=True):
            change = of(difference, name)
            cells += [f"{percent(other['score'])} ({interval(other)})"]
            cells += [f"{100 * change['difference']:+.1f} ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})"]
        yield cells


def _header(names: list[str]) -> list[str]:
    return ["", names[0], *(cell for name in names[1:] for cell in (name, "difference"))]


def _about(reports: list[dict[str, Any]]) -> list[str]:
    """What a reader of the table must know."""
    first = reports[0]
    if "overall" not in first:
        return [
            "95 % intervals where there are any. A difference's is that of different questions, so it is rather too wide.",
            *first["notes"],
        ]
    return [
        f"{first['images']} images of {first['prompts']} prompts a model, same seeds; scores in percent with 95 % "
        f"intervals; overall is the {first['overall_is']}; differences are paired, prompt by prompt.",
        *first["notes"],
    ]


def _table(names: list[str], reports: list[dict[str, Any]], differences: list[dict[str, Any]]) -> str:
    header = [escaped(cell) for cell in _header(names)]
    lines = [f"### {escaped(reports[0]['title'])}", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {' | '.join(map(escaped, cells))} |" for cells in _cells(reports, differences)]
    lines += [line for note in _about(reports) for line in ("", escaped(note))]
    return "\n".join(lines) + "\n"


STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d5d9de, #3a3f46); --muted: light-dark(#59636e, #9aa4af);
  --right: light-dark(#1a7f37, #3fb950); --wrong: light-dark(#cf222e, #ff7b72); --ground: light-dark(#fff, #14171a); }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1500px; padding: 1.5rem; background: var(--ground);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .75rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
tbody tr:first-child td { font-weight: 600; }
.muted, figcaption { color: var(--muted); }
nav { position: sticky; top: 0; z-index: 1; background: var(--ground); padding: .75rem 0; display: flex; gap: 1.25rem;
  flex-wrap: wrap; align-items: center; border-bottom: 1px solid var(--line); }
article { padding: 1rem 0; border-bottom: 1px solid var(--line); content-visibility: auto;
  contain-intrinsic-size: auto 340px; }
article[hidden] { display: none; }
h2 { font-size: 1.05rem; margin: 0 0 .5rem; }
h2 small { font-weight: 400; color: var(--muted); margin-left: .5rem; }
.models { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); }
h3 { font-size: .9rem; font-weight: 600; margin: 0 0 .35rem; }
.images { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: .5rem; }
figure { margin: 0; max-width: 224px; }
figure img { display: block; width: 100%; border-radius: 4px; border: 3px solid var(--wrong); }
figure.right img { border-color: var(--right); }
figcaption { font-size: .72rem; line-height: 1.3; padding-top: .2rem; overflow-wrap: anywhere; white-space: pre-line;
  max-height: 9em; overflow-y: auto; }
figcaption b { color: var(--wrong); }
figure.right figcaption b { color: var(--right); }
"""

SCRIPT = """
const articles = [...document.querySelectorAll('article')];
const category = document.querySelector('#category'), differ = document.querySelector('#differ');
const shown = document.querySelector('#shown');
function filter() {
  let count = 0;
  for (const article of articles) {
    const {category: tag, differ: differs} = article.dataset;
    article.hidden = (category.value && tag !== category.value) || (differ.checked && !differs);
    count += !article.hidden;
  }
  shown.textContent = `${count} of ${articles.length} prompts`;
}
category.onchange = differ.onchange = filter;
filter();
"""


def _page(
    names: list[str],
    reports: list[dict[str, Any]],
    differences: list[dict[str, Any]],
    runs: list[Path],
    rows: list[list[dict[str, Any]]],
    thumbnail: int,
) -> Iterator[str]:
    """The comparison as one HTML file, piece by piece, so that its images are never all in memory."""
    by_prompt: list[dict[str, list[dict[str, Any]]]] = []
    for model_rows in rows:
        by_prompt.append({})
        for row in model_rows:
            by_prompt[-1].setdefault(row["id"], []).append(row)

    def scores(prompt: str) -> list[float]:
        return [sum(row["score"] for row in model[prompt]) / len(model[prompt]) for model in by_prompt]

    # Failures come first: prompts on which the models after the base do worst, those that the base could draw before others.
    order = sorted(by_prompt[0], key=lambda prompt: (sum(scores(prompt)[1:]), -scores(prompt)[0], prompt))
    title = html.escape(f"{reports[0]['title']}: {' vs. '.join(names)}")
    yield f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
    yield f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head><body>\n'
    yield f'<h1>{title}</h1>\n<div class="scroll"><table><thead>{_html_row("th", _header(names))}</thead><tbody>\n'
    yield "\n".join(_html_row("td", cells) for cells in _cells(reports, differences))
    yield "\n</tbody></table></div>\n"
    yield "".join(f'<p class="muted">{html.escape(note)}</p>\n' for note in _about(reports))
    categories = sorted({row["tag"] for row in rows[0]})
    options = "".join(f"<option>{html.escape(category)}</option>" for category in categories)
    yield f'<nav><label>Category <select id="category"><option value="">all</option>{options}</select></label>\n'
    yield '<label><input type="checkbox" id="differ"> only where the models differ</label>\n'
    yield '<span class="muted" id="shown"></span></nav>\n<main>\n'
    for prompt in order:
        first, values = by_prompt[0][prompt][0], scores(prompt)
        differ = ' data-differ="1"' if len(set(values)) > 1 else ""
        yield f'<article data-category="{html.escape(first["tag"])}"{differ}>'
        yield f"<h2>{html.escape(first['prompt'])} <small>{html.escape(first['tag'])} · {html.escape(prompt)}</small></h2>"
        yield '<div class="models">\n'
        for name, run, model, value in zip(names, runs, by_prompt, values, strict=True):
            yield f'<section><h3>{html.escape(name)} <span class="muted">{percent(value)} %</span></h3><div class="images">'
            for row in model[prompt]:
                yield _figure(row, run, thumbnail)
            yield "</div></section>\n"
        yield "</div></article>\n"
    yield f"</main>\n<script>{SCRIPT}</script></body></html>\n"


def _html_row(cell: str, texts: list[str]) -> str:
    return "<tr>" + "".join(f"<{cell}>{html.escape(text)}</{cell}>" for text in texts) + "</tr>"


def _figure(row: dict[str, Any], run: Path, thumbnail: int) -> str:
    path = (run / row["filename"]).resolve()
    shown = "not shown: it lies outside the run's folder"
    if path.is_relative_to(run.resolve()):
        image = decode_image(path)
        image.thumbnail((thumbnail, thumbnail), Image.Resampling.LANCZOS)
        data = io.BytesIO()
        image.save(data, format="WEBP", quality=80)
        source = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
        shown = f'<img src="{source}" loading="lazy" decoding="async" alt="{html.escape(row["prompt"])}">'
    right = row["score"] == 1
    mark = ("✓" if right else "✗") if row["score"] in (0, 1) else f"{percent(row['score'])} %"
    reason = html.escape(row["reason"])
    return (
        f'<figure class="{"right" if right else "wrong"}">{shown}'
        f"<figcaption><b>{mark}</b> {reason}</figcaption></figure>"
    )
