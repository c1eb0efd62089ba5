import json
from types import SimpleNamespace

import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")

from lmms_eval.models.registry_v2 import ModelRegistryV2

from reca_trainer.evaluation.lmms_eval_model import RecALmms, manifest

DOCS = {"draw": [{}, {}, {}], "look": [{"image": Image.new("RGB", (40, 30), color)} for color in ("red", "blue")]}


def ask(model, task):
    """What lmms-eval asks for each document of a task."""
    model.task_dict = {task: {"test": DOCS[task]}}
    visual = lambda doc: [doc["image"]] if doc else []  # noqa: E731
    options = {"max_new_tokens": 3, "until": ["\n"]}
    documents = range(len(DOCS[task]))
    return model.generate_until(
        [SimpleNamespace(args=("<image>\nmake it red", options, visual, i, task, "test")) for i in documents]
    )


def test_lmms_eval_finds_the_model():
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("reca_trainer") is RecALmms


@pytest.mark.parametrize("task", ["draw", "look"])
def test_images_are_drawn_and_edited(bagel_folder, tmp_path, task):
    def run(batch_size, folder):
        arguments = f"pretrained={bagel_folder},mode=images,dtype=float32,output_dir={folder},num_inference_steps=2"
        arguments += ",guidance_interval=[0.0,1.0]"
        model = RecALmms.create_from_arg_string(arguments, {"batch_size": batch_size, "device": "cpu"})
        paths = [json.loads(answer)["images"] for answer in ask(model, task)]
        return [Image.open(path).convert("RGB") for [path] in paths]

    images = run(1, tmp_path / "one")
    assert len(images) == len(DOCS[task])
    assert len({image.tobytes() for image in images}) == len(images)  # each has its own seed
    for image, other in zip(images, run(2, tmp_path / "two"), strict=True):
        assert max(abs(a - b) for a, b in zip(image.tobytes(), other.tobytes(), strict=True)) <= 1


def test_questions_are_answered(bagel_folder):
    model = RecALmms(bagel_folder, dtype="float32", batch_size=2)
    answers = ask(model, "look")
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)


def test_what_it_cannot_do_is_said(bagel_folder):
    with pytest.raises(ValueError, match="'images' or 'text'"):
        RecALmms(bagel_folder, mode="video")
    model = RecALmms(bagel_folder, dtype="float32")
    model.task_dict = {"two": {"test": [None]}}
    request = SimpleNamespace(args=("compare", {}, lambda doc: [Image.new("RGB", (8, 8))] * 2, 0, "two", "test"))
    with pytest.raises(ValueError, match="two, request 0, shows 2 images"):
        model.generate_until([request])
