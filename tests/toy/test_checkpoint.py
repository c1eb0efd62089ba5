"""The embedded default: what ships, and that it knows its world."""

import copy
import hashlib
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from reca_trainer import RecAConfig, RecATrainer, toy
from reca_trainer.toy.detector import Detector
from reca_trainer.toy.score import INSTRUCTION, compare_images, held_out_scenes, judge_dense, questions, score
from reca_trainer.toy.world import World, normalise_answer


@pytest.fixture(scope="module")
def loaded():
    return toy.load()


def test_the_record_beside_the_weights_is_true(loaded):
    record = json.loads((toy.CHECKPOINT / "pretraining.json").read_text())
    weights = (toy.CHECKPOINT / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == record["sha256"]
    assert len(weights) <= 15e6
    assert sum(parameter.numel() for parameter in loaded[0].parameters()) == record["parameters"]


@pytest.mark.parametrize(("kind", "least"), [("where-is", 0.97), ("what-is-at", 0.97), ("how-many", 0.95), ("what-colour", 0.95)])
def test_it_knows_where_things_are_in_scenes_with_unseen_combinations(loaded, kind, least):
    model, processor = loaded
    world = World()
    asked = questions(world, kind, 100)
    answers = model.generate_text(
        processor, [text for _, text, _ in asked], images=[world.render(scene) for scene, _, _ in asked]
    )
    right = [normalise_answer(answer) == truth for answer, (_, _, truth) in zip(answers, asked, strict=True)]
    assert np.mean(right) >= least


@torch.no_grad()
def test_its_autoencoder_keeps_what_is_in_a_scene(loaded):
    model, processor = loaded
    world, scenes = World(), held_out_scenes(World(), 100)
    pictures = [world.render(scene) for scene in scenes]
    pixels = processor.to_pixels(pictures, processor.generation_size)
    decoded = model.decode_target(model.encode_target(pixels, torch.zeros(len(pixels), 4, 12, 12)))
    array = ((decoded * 0.5 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    images = [Image.fromarray(levels) for levels in array]
    assert judge_dense(Detector(world)(images), [world.facts(scene) for scene in scenes])["soft"]["mean"] >= 0.98
    assert compare_images(images, pictures)["psnr"]["mean"] >= 33


def test_its_score_is_the_same_twice(loaded):
    first, second = (score(*loaded, size=2, batch_size=5, sampling=toy.SAMPLING, progress=False) for _ in range(2))
    assert first == second


def test_a_short_run_of_reca_reconstructs_scenes_it_never_saw_3_db_better(loaded, tmp_path):
    base, processor = loaded
    originals = [World().render(scene) for scene in held_out_scenes(World(), 24)]

    def reconstruct(model):
        noise = [torch.Generator().manual_seed(index) for index in range(len(originals))]
        sampling = {**toy.SAMPLING, "guidance_scale": 1.0}
        images = model.eval().generate_images(
            processor, [INSTRUCTION] * 24, originals, task="reconstruct", generator=noise, **sampling
        )
        return compare_images(images, originals)["psnr"]["mean"]

    before = reconstruct(base)
    args = RecAConfig(
        output_dir=str(tmp_path),
        max_steps=90,
        learning_rate=2e-3,
        per_device_train_batch_size=16,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
    )
    trainer = RecATrainer(
        copy.deepcopy(base), args, train_dataset=toy.dataset("train", 500), processing_class=processor,
        peft_config=LoraConfig(r=32, lora_alpha=64),
    )  # fmt: skip
    trainer.train()
    assert reconstruct(trainer.model) >= before + 3
