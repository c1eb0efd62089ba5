import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from reca_trainer.cli import evaluate
from reca_trainer.evaluation.geneval import (
    CLASSES,
    COLORS,
    TAGS,
    ColorClassifier,
    Detector,
    GenEval,
    Rules,
    check_metadata,
    decide,
    prompts,
    read_prompts,
)


def sha256(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def noise(seed, size=(70, 50)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def test_prompts_are_the_published_553():
    published = prompts()
    assert [prompt.id for prompt in published] == [f"{i:05}" for i in range(553)]
    assert (
        sha256(json.dumps(prompt.metadata, sort_keys=True) for prompt in published)
        == "94bc1c23d27e1ac4aa6d9415ac49a6e72263694e5149eb1d895cf61f9da1c083"
    )
    assert (
        sha256(prompt.text for prompt in published)
        == "4de60dfc3c29f9d3db69ec45cf03a964627c2d82f2c224c3f75645e137f7126b"
    )
    for prompt in published:
        check_metadata(prompt.metadata, prompt.id)


def test_rewritten_prompts_keep_the_names_of_the_published(tmp_path):
    published = prompts()
    lines = [json.dumps({**prompt.metadata, "prompt": f"A realistic {prompt.text}, é\u2028."}) for prompt in published]
    (tmp_path / "long.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rewritten = read_prompts(tmp_path / "long.jsonl")
    assert [prompt.id for prompt in rewritten] == [prompt.id for prompt in published]
    assert [prompt.text for prompt in rewritten] == [f"A realistic {prompt.text}, é\u2028." for prompt in published]
    for prompt, other in zip(rewritten, published, strict=True):
        assert {**prompt.metadata, "prompt": other.text} == other.metadata


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompt"),
        ('{"tag": "t", "include": [], "prompt": "p"}\n{broken', r"p\.jsonl, line 2 is not one JSON object"),
        ("[]", 'line 1 lacks "prompt"'),
        ('{"tag": "t", "include": []}', 'line 1 lacks "prompt"'),
        ('{"prompt": "p"}', 'line 1 needs "tag" and "include"'),
    ],
)
def test_a_broken_prompt_file_names_its_line(tmp_path, content, message):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"include": []}, '"tag"'),
        ({"tag": "t", "include": "dog"}, '"include"'),
        ({"tag": "t", "include": [{"class": "mouse", "count": 1}]}, "'mouse' is none of the 80"),
        ({"tag": "t", "include": [{"class": "dog"}]}, '"count"'),
        ({"tag": "t", "include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "earlier clause"),
        ({"tag": "t", "include": [], "exclude": [{"class": "unicorn", "count": 1}]}, "unicorn"),
    ],
)
def test_metadata_that_cannot_be_scored_is_refused(metadata, message):
    with pytest.raises(ValueError, match=message):
        check_metadata(metadata, "file 7")


def test_an_empty_image_is_wrong_and_asks_for_no_colour():
    metadata = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    decision = decide(metadata, {"dog": np.zeros((0, 5))}, lambda name, kept: pytest.fail("asked for a colour"))
    assert (decision.correct, decision.reasons, decision.kept) == (False, ["expected dog>=1, found 0"], {})


def test_detections_are_tight_boxes_of_masks_of_the_image(detector_folder):
    detector = Detector(detector_folder)
    images = [noise(0), noise(1, (64, 40))]
    for image, detected in zip(images, detector(images, threshold=0.0), strict=True):
        assert detected and set(detected) <= set(CLASSES)
        for boxes, masks in detected.values():
            assert masks.dtype == bool and masks.shape == (len(boxes), image.height, image.width)
            for (x0, y0, x1, y1, score), mask in zip(boxes, masks, strict=True):
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                assert (x0, y0, x1, y1) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                assert 0 < score <= 1


def test_the_threshold_only_drops_detections(detector_folder):
    detector = Detector(detector_folder)
    [everything] = detector([noise(0)], 0.0)
    threshold = float(np.median(np.concatenate([boxes[:, 4] for boxes, _ in everything.values()])))
    [some] = detector([noise(0)], threshold)
    expected = {name: boxes[boxes[:, 4] > threshold] for name, (boxes, _) in everything.items()}
    expected = {name: boxes.tolist() for name, boxes in expected.items() if len(boxes)}
    assert {name: boxes.tolist() for name, (boxes, _) in some.items()} == expected
    assert 0 < sum(map(len, expected.values())) < sum(len(boxes) for boxes, _ in everything.values())


def test_a_mask_becomes_the_box_and_score_of_its_class(detector_folder):
    detector = Detector(detector_folder)
    logits, masks = torch.full((3, 81), -9.0), torch.full((3, 8, 8), -50.0)
    logits[:, 80] = 9.0  # no object
    logits[1, [16, 80]] = torch.tensor([9.0, -9.0])  # a dog
    masks[1, 2:4, 1:6] = 50.0
    valid = torch.ones(32, 32, dtype=torch.bool)
    valid[:, 24:] = False  # the right quarter pads the batch
    detected = detector._instances(logits, masks, valid, (64, 48), (32, 32), 0.3)
    [(name, (boxes, mask))] = detected.items()
    assert name == "dog" and 0.95 < mask.sum() / (40 * 16) <= 1  # corners are rounded
    assert boxes[0, :4].tolist() == [8, 16, 48, 32] and boxes[0, 4] > 0.99


def test_another_set_of_classes_is_refused(detector_folder, tmp_path):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

    config = Mask2FormerConfig.from_pretrained(detector_folder, num_labels=133)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    Mask2FormerImageProcessorPil.from_pretrained(detector_folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="knows 133 classes"):
        Detector(str(tmp_path))


def test_a_colour_is_that_of_the_object_not_of_what_surrounds_it(clip_folder):
    classifier = ColorClassifier(clip_folder)
    masks = np.zeros((2, 50, 70), dtype=bool)
    masks[0, 10:30, 20:50], masks[1, 5:45, 5:15] = True, True
    boxes = np.array([[20, 10, 50, 30], [5, 5, 15, 45]])
    image = noise(0)
    elsewhere = Image.composite(image, noise(1), Image.fromarray(masks.any(0)))
    colors = classifier(image, boxes, masks, "dog")
    assert len(colors) == 2 and set(colors) <= set(COLORS)
    assert classifier(elsewhere, boxes, masks, "dog") == colors
    assert classifier(image, boxes[1:], masks[1:], "dog") == colors[1:]


def test_a_colours_description_is_the_mean_of_its_templates(clip_folder):
    classifier = ColorClassifier(clip_folder)
    texts = ["a photo of a pink dog", "a photo of a pink-colored dog", "a photo of a pink object"]
    with torch.no_grad():
        units = [
            torch.nn.functional.normalize(
                classifier.model.get_text_features(**classifier.tokenizer([text], return_tensors="pt")).pooler_output[
                    0
                ],
                dim=-1,
            )
            for text in texts
        ]
    mean = torch.stack(units).mean(0)
    torch.testing.assert_close(classifier._descriptions("dog")[COLORS.index("pink")], mean / mean.norm())


def test_an_image_is_scored_as_its_detections_say(detector_folder, clip_folder, tmp_path):
    scorer = GenEval(Detector(detector_folder), ColorClassifier(clip_folder), Rules(threshold=0.0))
    path = tmp_path / "image.png"
    noise(3).save(path)
    detected = scorer.detector([noise(3)], 0.0)[0]
    name = max(detected, key=lambda name: len(detected[name][0]))
    count = len(detected[name][0])
    [right] = [
        p for p in prompts() if p.metadata["tag"] == "single_object" and p.metadata["include"][0]["class"] == name
    ]
    [row] = scorer(right, [path])
    assert row["correct"] and row["score"] == 1.0 and row["reason"] == ""
    assert row["categories"] == {"single_object": [1.0, 1]} and len(row["details"][name]) == count


@pytest.fixture(scope="module")
def whole_path(tmp_path_factory, bagel_folder, detector_folder, clip_folder):
    """generate → detect → classify → score → report, as the command runs it."""

    def run(folder):
        command = f"--model {bagel_folder} --benchmark geneval --output_dir {folder} --limit 12 --images_per_prompt 2"
        command += f" --batch_size 3 --dtype float32 --detector {detector_folder} --color_classifier {clip_folder}"
        evaluate.main([*command.split(), "--sampling", "num_inference_steps=2"])
        return json.loads((folder / "report.json").read_text())

    folder = tmp_path_factory.mktemp("geneval")
    return run, folder, run(folder)


def test_the_whole_path_reports_every_category(whole_path, detector_folder):
    _, folder, report = whole_path
    assert set(report["categories"]) == set(TAGS)
    assert (report["images"], report["prompts"]) == (24, 12)
    assert report["scorer"]["detector"]["name"] == detector_folder
    text = (folder / "report.md").read_text()
    assert detector_folder in text and "not with those of papers" in text and "| color_attr |" in text
    assert json.loads((folder / "images/00000/metadata.jsonl").read_text()) == prompts()[0].metadata
    assert (folder / "images/00000/samples/00001.png").exists()


def test_the_whole_path_resumes_to_the_same_result(whole_path):
    run, folder, report = whole_path
    rows = (folder / "results.jsonl").read_text()
    images = {path: path.read_bytes() for path in folder.glob("images/*/samples/*.png")}
    for path in list(images)[5:9]:
        path.unlink()
    for name in ("results.jsonl", "report.json"):
        (folder / name).unlink()
    next(folder.glob("scores/*.json")).unlink()
    assert run(folder) == report
    assert (folder / "results.jsonl").read_text() == rows
    assert {path: path.read_bytes() for path in images} == images


def test_images_made_elsewhere_get_the_same_scores(whole_path, detector_folder, clip_folder, tmp_path):
    _, folder, report = whole_path
    command = f"--images {folder / 'images'} --benchmark geneval --output_dir {tmp_path}"
    evaluate.main(f"{command} --detector {detector_folder} --color_classifier {clip_folder}".split())
    again = json.loads((tmp_path / "report.json").read_text())
    assert (again["overall"], again["categories"]) == (report["overall"], report["categories"])
