"""GenEval's decisions on the reference cases: synthetic detections and what the original scorer made of them."""

import json
import re

import numpy as np
import pytest

from reca_trainer.evaluation.geneval import Rules, decide
from reca_trainer.evaluation.report import summarize
from tests.conftest import golden_folder

FOLDER = golden_folder("geneval")
SETS = json.loads((FOLDER / "cases.json").read_text())["sets"]


def verdict(case, options):
    boxes = {name: np.asarray(rows) for name, rows in case["detections"].items()}
    return decide(
        case["metadata"], boxes, lambda name, kept: [case["colors"][name][i] for i in kept], Rules(**options)
    )


def unordered(reason):
    """Where a reason lists several relations their order is not fixed."""
    return re.sub(r"found (.*) target", lambda m: f"found {sorted(m[1].split(' and '))} target", reason)


@pytest.mark.parametrize(
    ("number", "index"), [(number, index) for number, cases in enumerate(SETS) for index in range(len(cases["cases"]))]
)
def test_decision(number, index):
    case, options = SETS[number]["cases"][index], SETS[number]["options"]
    decision, expected = verdict(case, options), case["expected"]
    assert decision.correct == expected["correct"]
    assert sorted(map(unordered, decision.reasons)) == sorted(map(unordered, expected["reason"]))
    kept = {name: [case["detections"][name][i] for i in indices] for name, indices in decision.kept.items()}
    assert kept == expected["kept"]


@pytest.mark.parametrize("number", range(len(SETS)))
def test_summary(number):
    cases, expected = SETS[number]["cases"], SETS[number]["expected_summary"]
    rows = []
    for index, case in enumerate(cases):
        score = float(verdict(case, SETS[number]["options"]).correct)
        rows.append({"id": str(index), "score": score, "categories": {case["metadata"]["tag"]: [score, 1]}})
    summary = summarize(rows, overall="mean of categories")
    assert {tag: estimate["score"] for tag, estimate in summary["categories"].items()} == pytest.approx(
        expected["by_tag"]
    )
    assert summary["overall"]["score"] == pytest.approx(expected["overall_mean_of_tags"])
    assert summary["images"] == expected["images"]
