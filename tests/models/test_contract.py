"""What `models/contract.py` promises of every family, on tiny models with random weights (BAGEL: the embedded default)."""

import copy
import functools
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from reca_trainer import toy
from reca_trainer.adapters import attach
from reca_trainer.models import harmon, janus, openuni, show_o
from reca_trainer.toy.tokenizer import make_tokenizer

TASKS = {
    "bagel": ("reconstruct", "caption", "generate", "edit"),
    **dict.fromkeys(("harmon", "janus", "openuni", "show_o"), ("reconstruct", "caption", "generate")),
}
CASES = [(family, task) for family, tasks in TASKS.items() for task in tasks]
TEXTS = ["a red circle", "a small blue square at the left of a green triangle"]
RNG = np.random.default_rng(0)
IMAGES = [Image.fromarray(RNG.integers(0, 255, (side, side, 3), dtype=np.uint8)) for side in (36, 64)]


@functools.cache
def build(family):
    """In eval mode; shared, so tests that change a model take a `fresh` one."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    if family == "bagel":
        model, processor = toy.load()
    elif family == "harmon":
        config = harmon.Config.tiny(len(tokenizer))
        model, processor = harmon.Model(config), harmon.Processor.tiny(config, tokenizer)
    elif family == "janus":
        config = janus.Config.tiny(len(tokenizer) + 6, image_size=16)
        model, processor = janus.Model(config), janus.Processor.tiny(config, tokenizer)
    elif family == "openuni":
        config = openuni.Config.tiny(len(tokenizer) + 3)
        model, processor = openuni.Model(config), openuni.Processor.tiny(config, tokenizer)
    else:
        config = show_o.Config.tiny(len(tokenizer), tokenizer.eos_token_id, image_size=16)
        model, processor = show_o.Model(config), show_o.Processor.from_config(tokenizer, config)
    return model.eval(), processor


def fresh(family):
    model, processor = build(family)
    return copy.deepcopy(model), processor


def make_batch(processor, task, samples=(0, 1)):
    images, texts = [IMAGES[i] for i in samples], [TEXTS[i] for i in samples]
    if task == "edit":
        images = [(IMAGES[1 - i], IMAGES[i]) for i in samples]
    instruction = None if task in ("generate", "edit") else "describe the image"
    return processor(images=images, text=None if task == "reconstruct" else texts, instruction=instruction, task=task)


def draw(model, batch, samples=(0, 1)):
    return model.sample_corruption(batch, [torch.Generator().manual_seed(11 + i) for i in samples])


def within(name, modules):
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def test_the_tasks_of_every_family_are_tested():
    assert {family: build(family)[0].tasks for family in TASKS} == TASKS


@torch.no_grad()
@pytest.mark.parametrize(("family", "task"), CASES)
def test_a_batch_is_the_weighted_mean_of_its_samples(family, task):
    model, processor = build(family)
    batch = make_batch(processor, task)
    corruption = draw(model, batch)
    together, count = model(**batch, corruption=corruption), model.count_supervised(batch, corruption)
    losses, counts = [], []
    for i in (0, 1):
        batch_of_one = make_batch(processor, task, [i])
        corruption_of_one = draw(model, batch_of_one, [i])
        losses.append(model(**batch_of_one, corruption=corruption_of_one).loss)
        counts.append(model.count_supervised(batch_of_one, corruption_of_one))
    assert count == sum(counts)
    assert abs(losses[0] - losses[1]) > 1e-4  # otherwise any weights would do
    torch.testing.assert_close(together.per_sample_loss, torch.stack(losses), rtol=0, atol=1e-5)
    expected = (losses[0] * counts[0] + losses[1] * counts[1]) / count
    torch.testing.assert_close(together.loss, expected, rtol=0, atol=1e-5)
    if family == "harmon" and task != "caption":  # `target` has all tokens, and several draws of each
        assert together.target[:, 0, :, 0][corruption["mask"]].numel() == count < together.target[:, 0, :, 0].numel()
    else:
        assert together.target.numel() == count


@pytest.mark.parametrize(("family", "task"), CASES)
def test_unknown_keys_and_tasks_are_refused_by_name(family, task):
    model, processor = build(family)
    batch = make_batch(processor, task)
    with pytest.raises(ValueError, match=f"'{task}'.*no use for pixel_valeus in"):
        model(**batch, pixel_valeus=torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"cannot do the task 'sing'.*reconstruct"):
        model(**{**batch, "task": "sing"})


@pytest.mark.parametrize("family", TASKS)
def test_what_is_not_trained_stays_in_eval_mode_and_gets_no_gradient(family):
    model, processor = fresh(family)
    frozen = {name: p.clone() for name, p in model.named_parameters() if within(name, model.frozen_modules)}
    model.train()
    fixed = [*model.understanding_modules, *model.frozen_modules]
    assert frozen
    assert not [name for name, module in model.named_modules() if module.training and within(name, fixed)]
    assert any(module.training and within(name, model.generation_modules) for name, module in model.named_modules())
    model.freeze_understanding()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if within(name, model.generation_modules)}
    model(**make_batch(processor, "reconstruct")).loss.backward()
    torch.optim.SGD((p for p in model.parameters() if p.grad is not None), lr=1.0).step()
    assert all(torch.equal(model.get_parameter(name), before) for name, before in frozen.items())
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= trainable


@pytest.mark.parametrize("family", TASKS)
def test_lora_touches_exactly_its_targets(family):
    model, _ = fresh(family)
    targets = {name for name, _ in model.named_modules() if re.fullmatch(model.lora_target_modules, name)}
    assert targets and all(within(name, model.generation_modules) for name in targets)
    adapted = attach(model, LoraConfig(r=2))
    touched = {name for name, module in adapted.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert touched == targets
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)


@torch.no_grad()
@pytest.mark.parametrize("family", TASKS)
def test_the_three_encodings(family):
    model, processor = build(family)
    batch = make_batch(processor, "reconstruct")
    condition = model.encode_condition(batch.get("condition_pixel_values", batch["pixel_values"]))
    torch.testing.assert_close(model(**batch).understanding_embeds, condition)
    target = model.encode_target(batch["pixel_values"])
    assert target.is_floating_point() or (target.dtype == torch.int64 and target.ndim == 2)
    assert model.decode_target(target).shape == batch["pixel_values"].shape
