"""From rows to scores with confidence intervals, alone and in pairs of models, and how they are written down.

The images of one prompt resemble each other, so prompts are what is counted as independent, never images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from reca_trainer.files import replacing

Overall = Literal["mean of categories", "mean of images"]
Z = 1.959964  # two-sided 95 %


def summarize(rows: list[dict[str, Any]], overall: Overall) -> dict[str, Any]:
    """Scores in [0, 1] with 95 % intervals: overall, and each category that the rows name.

    A category's score is the sum of its `categories` entries over the sum of their weights. Its interval is Wilson's, for the
    number of independent answers that explains how much the prompts differ (Korn and Graubard, 1998); where nothing
    differs, each prompt counts as one answer. The interval of a mean of categories combines theirs (Zou and Donner, 2008).

    Args:
        rows: one per image, with `id` of the prompt, `score`, and `categories`: `{name: [sum, weight]}`.
        overall: the mean of the categories' scores, whatever their sizes, or of the images' scores.
    """
    if not rows:
        raise ValueError("There is nothing to summarize: no image was scored.")
    parts = {name: _estimate(*_by_prompt(rows, name)) for name in _names(rows)}
    total = _mean(list(parts.values())) if overall == "mean of categories" else _estimate(*_by_prompt(rows))
    return {"overall": total, "categories": parts, "images": len(rows), "prompts": len({row["id"] for row in rows})}


def compare_rows(base: list[dict[str, Any]], other: list[dict[str, Any]], overall: Overall) -> dict[str, Any]:
    """`other` minus `base` on the same prompts with the same seeds, with 95 % intervals.

    The intervals are Agresti and Min's (2005) for paired answers, prompts being the pairs: they leave doubt also where
    few prompts happen to agree. The interval of a mean of categories combines theirs (Zou and Donner, 2008).

    Raises:
        ValueError: the two do not score the same images of the same prompts.
    """
    keys = [[(row["id"], Path(row["filename"]).name) for row in rows] for rows in (base, other)]
    if sorted(keys[0]) != sorted(keys[1]):
        missing = sorted(set(keys[0]) ^ set(keys[1]))[:3]
        raise ValueError(f"Only runs over the same images can be compared; in one of the two only: {missing}.")

    def difference(name: str | None = None) -> dict[str, float]:
        (base_sums, weights), (sums, _) = _by_prompt(base, name), _by_prompt(other, name)
        return _paired_difference(sums - base_sums, weights)

    parts = {name: difference(name) for name in _names(base)}
    total = _mean(list(parts.values()), "difference") if overall == "mean of categories" else difference()
    return {"overall": total, "categories": parts}


def mean_and_margin(values: Sequence[float]) -> dict[str, float | None]:
    """`mean` and the 95 % `margin` of its standard error, `None` for a single value."""
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    margin = Z * math.sqrt(squares / (len(values) - 1) / len(values)) if len(values) > 1 else None
    return {"mean": mean, "margin": margin}


def summarize_measures(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and margin of each of the rows' `measures` (`{name: value}`), every prompt counting once.

    A measure that some row lacks is left out.
    """
    return {name: mean_and_margin(list(values.values())) for name, values in _measures(rows).items()}


def compare_measures(base: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """`other` minus `base`, paired by prompt: mean and margin of each measure that both have of every prompt."""
    before, after = _measures(base), _measures(other)
    return {
        name: mean_and_margin([value - before[name][prompt] for prompt, value in values.items()])
        for name, values in after.items()
        if before.get(name, {}).keys() == values.keys()
    }


def _measures(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The mean of each measure over the images of each prompt: `{measure: {prompt: mean}}`."""
    common = set.intersection(*(set(row.get("measures", {})) for row in rows))
    prompts: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        prompts.setdefault(row["id"], []).append(row.get("measures", {}))
    return {
        name: {
            prompt: sum(values[name] for values in measured) / len(measured) for prompt, measured in prompts.items()
        }
        for name in rows[0].get("measures", {})
        if name in common
    }


def _paired_difference(changes: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    difference, prompts = float(changes.sum() / weights.sum()), len(changes)
    # Two more prompts, half of one won and half of one lost, pull the interval to zero and keep it from vanishing.
    center = difference * prompts / (prompts + 2)
    residuals = (changes - center * weights) / weights.mean()
    variance = float((residuals**2).sum() + 1 + 2 * center**2) / (prompts + 2) ** 2
    half = Z * math.sqrt(variance)
    low, high = max(center - half, -1.0), min(center + half, 1.0)
    return {"difference": difference, "low": min(low, difference), "high": max(high, difference)}


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["categories"]))


def _by_prompt(rows: list[dict[str, Any]], name: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Sums and weights of one category, or of the images' scores, per prompt that has any: two float arrays `[prompts]`."""
    prompts: dict[str, list[float]] = {}
    for row in rows:
        value, weight = (row["score"], 1) if name is None else row["categories"].get(name, (0, 0))
        if weight:
            sums = prompts.setdefault(row["id"], [0.0, 0.0])
            sums[0] += value
            sums[1] += weight
    ordered = np.array([prompts[key] for key in sorted(prompts)])
    return ordered[:, 0], ordered[:, 1]


def _estimate(sums: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    score, prompts = float(sums.sum() / weights.sum()), len(sums)
    residuals = sums - score * weights
    variance = float((residuals**2).sum() / weights.sum() ** 2)
    independent = score * (1 - score) / variance if variance > 1e-12 else prompts
    spread = Z**2 / independent
    center = (score + spread / 2) / (1 + spread)
    half = math.sqrt(spread * score * (1 - score) + spread**2 / 4) / (1 + spread)
    return {"score": score, "low": min(center - half, score), "high": max(center + half, score)}


def _mean(categories: list[dict[str, float]], name: str = "score") -> dict[str, float]:
    mean = sum(estimate[name] for estimate in categories) / len(categories)
    below = math.sqrt(sum((estimate[name] - estimate["low"]) ** 2 for estimate in categories)) / len(categories)
    above = math.sqrt(sum((estimate["high"] - estimate[name]) ** 2 for estimate in categories)) / len(categories)
    return {name: mean, "low": mean - below, "high": mean + above}


def write_report(folder: str | Path, report: dict[str, Any]) -> str:
    """Write `report.json` and `report.md` into `folder` and return the latter.

    Args:
        report: `title`, `notes` (sentences a reader must see), what made the scores, `summarize`'s result with
            `overall_is` where there are shares, and `means`: `{name: {"mean", "margin"}}` of scores that are no shares.
    """
    lines = [f"### {report['title']}"]
    if "overall" in report:
        shares = [("overall", report["overall"]), *report["categories"].items()]
        lines += ["", "| | score | 95 % interval |", "|---|---|---|"]
        lines += [f"| {name} | {percent(estimate['score'])} | {interval(estimate)} |" for name, estimate in shares]
        lines += [
            "",
            f"{report['images']} images of {report['prompts']} prompts; overall is the {report['overall_is']}.",
        ]
    if report.get("means"):
        lines += ["", "| | mean | 95 % interval |", "|---|---|---|"]
        lines += [
            f"| {name} | {score['mean']:.4g} | {mean_interval(**score)} |" for name, score in report["means"].items()
        ]
    if "overall" not in report and "images" in report:
        lines += ["", f"{report['images']} images."]
    lines += [line for note in report["notes"] for line in ("", note)]
    text = "\n".join(lines) + "\n"
    for name, content in (("report.json", json.dumps(report, indent=2) + "\n"), ("report.md", text)):
        with replacing(Path(folder) / name) as temporary:
            temporary.write_text(content)
    return text


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def interval(estimate: dict[str, float]) -> str:
    return f"{percent(estimate['low'])} to {percent(estimate['high'])}"


def mean_interval(mean: float, margin: float | None) -> str:
    return "" if margin is None else f"{mean - margin:.4g} to {mean + margin:.4g}"
