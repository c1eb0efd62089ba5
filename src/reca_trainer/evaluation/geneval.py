"""GenEval (Ghosh et al., 2023, arXiv 2310.11513): are the objects, counts, colours and positions of a prompt in the image?

The prompts and the decision are those of the benchmark, to the last image. Its detector (an mmdetection checkpoint of
Mask2Former) needs mmcv, so another training run of the same architecture takes its place: **scores with it are not
comparable to published ones**, only to each other; the report says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    PreTrainedModel,
)

from reca_trainer.evaluation.generation import Prompt, batched
from reca_trainer.images import decode_image

CLASSES = (  # noqa: SIM905 (80 lines otherwise)
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, "
    "laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, "
    "book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
).split(", ")
COCO_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = ("zero", "one", "two", "three", "four")

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
COLOR_CLASSIFIER = "openai/clip-vit-large-patch14"
REVISIONS = {  # the commits that the defaults stand for
    DETECTOR: "f77f179fc62b98f6734481ebbef5bceeb1e7f10b",
    COLOR_CLASSIFIER: "32bd64288804d66eefd0ccbe215aa642df71cc41",
}
COLOR_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


# The prompts


def prompts() -> list[Prompt]:
    """The 553 prompts of the published set, in its order, named `00000` to `00552`."""
    rng = np.random.default_rng(43)
    person = CLASSES.index("person")

    def classes(size: int) -> list[str]:
        return [CLASSES[i] for i in rng.choice(len(CLASSES), size=size, replace=False)]

    def colorable(drawn: Any) -> str:
        """One of the 79 classes that have a colour: all but person."""
        return CLASSES[(int(drawn) + 1 + person) % len(CLASSES)]

    def two_object() -> dict[str, Any]:
        a, b = classes(2)
        return _prompt("two_object", [_clause(a), _clause(b)], f"a photo of {_a(a)} and {_a(b)}")

    def counting() -> dict[str, Any]:
        name, count = CLASSES[rng.choice(len(CLASSES))], int(rng.integers(2, 4, endpoint=True))
        plural = name + ("es" if name.endswith("s") else "s")
        metadata = _prompt("counting", [_clause(name, count)], f"a photo of {NUMBERS[count]} {plural}")
        return {**metadata, "exclude": [_clause(name, count + 1)]}

    def colors() -> dict[str, Any]:
        name, color = colorable(rng.choice(len(CLASSES) - 1)), COLORS[rng.choice(len(COLORS))]
        return _prompt("colors", [_clause(name, color=color)], f"a photo of {_a(f'{color} {name}')}")

    def position() -> dict[str, Any]:
        (a, b), relation = classes(2), RELATIONS[rng.choice(len(RELATIONS))]
        include = [_clause(b), _clause(a, position=[relation, 0])]
        return _prompt("position", include, f"a photo of {_a(a)} {relation} {_a(b)}")

    def color_attr() -> dict[str, Any]:
        a, b = map(colorable, rng.choice(len(CLASSES) - 1, size=2, replace=False))
        color_a, color_b = (COLORS[i] for i in rng.choice(len(COLORS), size=2, replace=False))
        include = [_clause(a, color=color_a), _clause(b, color=color_b)]
        return _prompt("color_attr", include, f"a photo of {_a(f'{color_a} {a}')} and {_a(f'{color_b} {b}')}")

    drawn = [_prompt("single_object", [_clause(name)], f"a photo of {_a(name)}") for name in classes(len(CLASSES))]
    drawn += [draw() for draw in (two_object, counting, colors, position, color_attr) for _ in range(100)]
    unique = {repr(sorted(metadata.items())): metadata for metadata in reversed(drawn)}  # the first of equals stays
    kept = [metadata for metadata in drawn if unique[repr(sorted(metadata.items()))] is metadata]
    return [Prompt(f"{number:05}", metadata["prompt"], metadata) for number, metadata in enumerate(kept)]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts in the form of the benchmark's `evaluation_metadata.jsonl`: one JSON object a line, with `prompt` and what
    is scored. As there, the first is `00000`, so that rewritten prompts share the names of those they stand for.

    Raises:
        ValueError: a line is none, or cannot be scored; the message names it. Or there is none.
    """
    described = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                metadata = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not one JSON object: {error}") from error
            if not isinstance(metadata, dict) or not isinstance(metadata.get("prompt"), str):
                raise ValueError(f'{where} lacks "prompt".')
            check_metadata(metadata, where)
            described.append(metadata)
    if not described:
        raise ValueError(f"{path} holds no prompt; there must be one a line.")
    return [Prompt(f"{number:05}", metadata["prompt"], metadata) for number, metadata in enumerate(described)]


def _prompt(tag: str, include: list[dict[str, Any]], text: str) -> dict[str, Any]:
    return {"tag": tag, "include": include, "prompt": text}


def _clause(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def check_metadata(metadata: dict[str, Any], source: str) -> None:
    """Refuse what cannot be scored: a file made by another tool may say anything.

    Raises:
        ValueError: `tag` or `include` is missing, a class is not COCO's, or a position names no earlier clause.
    """
    if not isinstance(metadata.get("tag"), str) or not isinstance(metadata.get("include"), list):
        raise ValueError(f'{source} needs "tag" and "include" (a list of clauses) to be scored by GenEval.')
    for number, clause in enumerate([*metadata["include"], *metadata.get("exclude", [])]):
        if clause.get("class") not in CLASSES:
            raise ValueError(f"{source}: {clause.get('class')!r} is none of the 80 classes the detector knows.")
        if not isinstance(clause.get("count"), int):
            raise ValueError(f'{source}: the clause of {clause["class"]!r} lacks its "count".')
        relation, target = clause.get("position", (RELATIONS[0], -1))
        if relation not in RELATIONS or target >= number:
            raise ValueError(f"{source}: position {clause['position']} is not a relation to an earlier clause.")


# The decision


@dataclass(frozen=True)
class Rules:
    """The numbers behind a decision; the defaults are the benchmark's.

    Args:
        threshold: detections count above this score.
        counting_threshold: the same for counting prompts.
        max_objects: at most so many detections of a class count.
        max_overlap: detections of a class that overlap a better one by this IoU or more are dropped; 1 keeps all.
        position_threshold: share of the two boxes' sizes by which their offset is shrunk before it counts.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1


@dataclass(frozen=True)
class Decision:
    """Args:
    correct: whether the image shows what the prompt asks for.
    reasons: one line per clause that failed.
    kept: per class the indices of the detections that counted, best first.
    """

    correct: bool
    reasons: list[str]
    kept: dict[str, list[int]]


def decide(
    metadata: dict[str, Any],
    detections: dict[str, np.ndarray],
    classify_colors: Callable[[str, list[int]], list[str]],
    rules: Rules | None = None,
) -> Decision:
    """GenEval's verdict on one image.

    Args:
        metadata: the prompt's `tag`, `include` and `exclude`.
        detections: per class `[N, 5]` boxes and scores: x0, y0, x1, y1 in pixels, score.
        classify_colors: names the colours of these detections of a class; called for colour clauses only.
    """
    rules = rules or Rules()
    threshold = rules.counting_threshold if metadata["tag"] == "counting" else rules.threshold
    kept = {name: _keep(np.asarray(boxes), threshold, rules) for name, boxes in detections.items()}
    kept = {name: indices for name, indices in kept.items() if indices}
    reasons: list[str] = []
    matched: list[np.ndarray | None] = []  # per include clause its boxes, None where it failed

    for clause in metadata.get("include", []):
        name, count = clause["class"], clause["count"]
        taken = kept.get(name, [])[:count]
        failures = []
        if len(taken) < count:
            failures.append(f"expected {name}>={count}, found {len(taken)}")
        else:
            boxes = np.asarray(detections[name])[taken, :4]
            if "color" in clause:
                failures += _color_failure(clause, classify_colors(name, taken))
            if "position" in clause and not failures:
                relation, target = clause["position"]
                failures += _position_failure(name, boxes, relation, matched[target], rules)
        matched.append(None if failures else boxes)
        reasons += failures

    for clause in metadata.get("exclude", []):
        seen = len(kept.get(clause["class"], []))
        if seen >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {seen}")
    return Decision(not reasons, reasons, kept)


def _keep(boxes: np.ndarray, threshold: float, rules: Rules) -> list[int]:
    """Indices of the detections of one class that count, best first."""
    if not len(boxes):
        return []
    order = np.argsort(boxes[:, 4], kind="stable")[::-1]
    order = [int(i) for i in order if boxes[i, 4] > threshold][: rules.max_objects]
    if rules.max_overlap == 1:
        return order
    kept: list[int] = []
    for i in order:
        if all(_iou(boxes[i], boxes[j]) < rules.max_overlap for j in kept):
            kept.append(i)
    return kept


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of boxes whose last pixel belongs to them."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a[:4]) + area(*b[:4]) - shared
    return shared / union if union else 0.0


def _color_failure(clause: dict[str, Any], colors: list[str]) -> list[str]:
    wanted = clause["color"]
    if colors.count(wanted) >= clause["count"]:
        return []
    seen = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
    name, count = clause["class"], clause["count"]
    return [f"expected {wanted} {name}>={count}, found {colors.count(wanted)} {wanted}; and {seen}"]


def _position_failure(
    name: str, boxes: np.ndarray, relation: str, targets: np.ndarray | None, rules: Rules
) -> list[str]:
    if targets is None:
        return [f"no target for {name} to be {relation}"]
    for box, target in product(boxes, targets):
        seen = _relations(box, target, rules.position_threshold)
        if relation not in seen:
            return [f"expected {name} {relation} target, found {' and '.join(seen)} target"]
    return []


def _relations(box: np.ndarray, target: np.ndarray, shrink: float) -> list[str]:
    """Where `box` stands seen from `target`; two relations if it stands diagonally, none if it is too close."""
    (start, end), (target_start, target_end) = box.reshape(2, 2), target.reshape(2, 2)
    offset = (start + end) / 2 - (target_start + target_end) / 2
    sizes = np.abs(end - start) + np.abs(target_end - target_start)
    shrunk = np.maximum(np.abs(offset) - shrink * sizes, 0) * np.sign(offset)
    if np.all(np.abs(shrunk) < 1e-3):
        return []
    x, y = shrunk / np.linalg.norm(offset)
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return [relation for relation, true in zip(RELATIONS, holds, strict=True) if true]


# Detection


class Detector:
    """Finds COCO objects with a Mask2Former of transformers.

    Args:
        name: id or folder of a `Mask2FormerForUniversalSegmentation` with COCO's 80 instance classes.
        revision: commit, branch or tag on the Hub; by default the pinned one of the default.
        max_detections: best pairs of query and class that are looked at, as in mmdetection.

    Raises:
        ValueError: the model does not know COCO's 80 classes.
    """

    def __init__(
        self,
        name: str = DETECTOR,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        max_detections: int = 100,
    ):
        revision = revision or REVISIONS.get(name)
        self.processor = Mask2FormerImageProcessorPil.from_pretrained(name, revision=revision)
        self.model = Mask2FormerForUniversalSegmentation.from_pretrained(name, revision=revision).to(device).eval()
        self.source, self.max_detections = _source(name, revision, self.model), max_detections
        labels = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        labels = [COCO_NAMES.get(label, label) for label in labels]
        if len(labels) != len(CLASSES):
            raise ValueError(f"{name} knows {len(labels)} classes; GenEval needs COCO's {len(CLASSES)} of instances.")
        self.classes = labels if set(labels) == set(CLASSES) else list(CLASSES)

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image], threshold: float = 0.3) -> list[dict[str, tuple]]:
        """Detect the objects of each image.

        Returns:
            Per image, per class found: `[N, 5]` float boxes (x0, y0, x1, y1 in pixels, the end exclusive) with scores
            above `threshold`, and `[N, height, width]` bool masks.
        """
        inputs = self.processor(images=images, return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs)
        return [
            self._instances(logits, masks, valid, image.size[::-1], inputs["pixel_values"].shape[-2:], threshold)
            for logits, masks, valid, image in zip(
                outputs.class_queries_logits,
                outputs.masks_queries_logits,
                inputs["pixel_mask"].bool(),
                images,
                strict=True,
            )
        ]

    def _instances(
        self,
        logits: torch.Tensor,  # [Q, classes + 1]
        mask_logits: torch.Tensor,  # [Q, h, w]
        valid: torch.Tensor,  # [H, W], False where the batch was padded
        size: tuple[int, int],
        padded: tuple[int, int],
        threshold: float,
    ) -> dict[str, tuple]:
        probabilities = logits.softmax(-1)[:, :-1]
        scores, best = probabilities.flatten().topk(min(self.max_detections, probabilities.numel()))
        best = best[scores > threshold]  # the mask's certainty can only lower the score further
        instances: dict[str, list[tuple[list[float], np.ndarray]]] = {}
        for index, score in zip(best.tolist(), scores.tolist(), strict=False):
            query, label = divmod(index, len(self.classes))
            mask = _resize(mask_logits[query], padded)
            mask = _resize(mask[: int(valid.any(1).sum()), : int(valid.any(0).sum())], size)  # [height, width]
            inside = mask > 0
            certainty = float((mask.sigmoid() * inside).sum() / (inside.sum() + 1e-6))
            if not inside.any() or score * certainty <= threshold:
                continue
            rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            instances.setdefault(self.classes[label], []).append(
                ([float(x) for x in box] + [score * certainty], inside.cpu().numpy())
            )
        return {name: tuple(map(np.stack, zip(*objects, strict=True))) for name, objects in instances.items()}


def _resize(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`[h, w]` → `[*size]`."""
    return torch.nn.functional.interpolate(logits[None, None], size=tuple(size), mode="bilinear")[0, 0]


class ColorClassifier:
    """Names an object's colour, zero-shot with a CLIP of transformers: the colour whose descriptions fit it best.

    Args:
        name: id or folder of a `CLIPModel`.
        revision: commit, branch or tag on the Hub; by default the pinned one of the default.
    """

    def __init__(self, name: str = COLOR_CLASSIFIER, revision: str | None = None, device: str | torch.device = "cpu"):
        revision = revision or REVISIONS.get(name)
        self.processor = CLIPImageProcessorPil.from_pretrained(name, revision=revision)
        self.tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        self.model = CLIPModel.from_pretrained(name, revision=revision).to(device).eval()
        self.source = _source(name, revision, self.model)
        self._of_class: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def __call__(self, image: Image.Image, boxes: np.ndarray, masks: np.ndarray, name: str) -> list[str]:
        """The colours of the objects of class `name`.

        Args:
            boxes: `[N, 4]` in pixels.
            masks: `[N, height, width]` bool; what lies outside an object is painted over in neutral grey.
        """
        grey = Image.new("RGB", image.size, "#999")
        cut = [
            Image.composite(image, grey, Image.fromarray(mask)).crop(tuple(box))
            for box, mask in zip(np.asarray(boxes).tolist(), masks, strict=True)
        ]
        pixels = self.processor(images=cut, return_tensors="pt").to(self.model.device)
        features = self.model.get_image_features(**pixels).pooler_output  # [N, D]
        return [COLORS[i] for i in (features @ self._descriptions(name).T).argmax(-1).tolist()]

    def _descriptions(self, name: str) -> torch.Tensor:
        """`[10, D]`, the mean unit embedding of each colour's descriptions."""
        if name not in self._of_class:
            texts = [template.format(color=color, name=name) for color in COLORS for template in COLOR_TEMPLATES]
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)
            features = self.model.get_text_features(**tokens).pooler_output
            features = torch.nn.functional.normalize(features, dim=-1).unflatten(0, (len(COLORS), -1)).mean(1)
            self._of_class[name] = torch.nn.functional.normalize(features, dim=-1)
        return self._of_class[name]


def _source(name: str, revision: str | None, model: PreTrainedModel) -> dict[str, str | None]:
    """Which weights: the commit that was loaded where the Hub says so, else the revision asked for."""
    return {"name": str(name), "revision": getattr(model.config, "_commit_hash", None) or revision}


# From images to rows


class GenEval:
    """Scores the images of a prompt.

    Args:
        detector, color_classifier: what looks at the images.
        rules: the decision's numbers.
        batch_size: images the detector sees at once.
    """

    def __init__(
        self, detector: Detector, color_classifier: ColorClassifier, rules: Rules | None = None, batch_size: int = 4
    ):
        self.detector, self.color_classifier = detector, color_classifier
        self.rules, self.batch_size = rules or Rules(), batch_size

    @property
    def scorer(self) -> dict[str, Any]:
        """What the scores depend on besides the images."""
        return {
            "benchmark": "geneval",
            "detector": self.detector.source,
            "color_classifier": self.color_classifier.source,
            "rules": vars(self.rules),
        }

    def __call__(self, prompt: Prompt, paths: list[Path]) -> list[dict[str, Any]]:
        """One row per image: `tag`, `correct`, `reason`, and the objects that counted, as the original writes them."""
        check_metadata(prompt.metadata, f"The metadata of prompt {prompt.id}")
        threshold = min(self.rules.threshold, self.rules.counting_threshold)
        rows = []
        for batch in batched(paths, self.batch_size):
            images = [decode_image(path) for path in batch]
            for image, detections in zip(images, self.detector(images, threshold), strict=True):
                rows.append(self._row(prompt, image, detections))
        return rows

    def _row(self, prompt: Prompt, image: Image.Image, detections: dict[str, tuple]) -> dict[str, Any]:
        def colors(name: str, indices: list[int]) -> list[str]:
            boxes, masks = detections[name]
            return self.color_classifier(image, boxes[indices, :4], masks[indices], name)

        boxes = {name: boxes for name, (boxes, _) in detections.items()}
        decision = decide(prompt.metadata, boxes, colors, self.rules)
        tag, score = prompt.metadata["tag"], float(decision.correct)
        details = {name: boxes[name][indices].round(4).tolist() for name, indices in decision.kept.items()}
        reason = "\n".join(decision.reasons)
        return {
            "tag": tag,
            "correct": decision.correct,
            "score": score,
            "categories": {tag: [score, 1]},
            "reason": reason,
            "details": details,
        }
