"""What `models/contract` promises of every family: on tiny models with random weights, on the embedded model, which is
a pretrained BAGEL, and on the family that lives in these tests."""

import copy
import functools
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_pre_hook

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor, toy
from reca_trainer.adapters import attach
from reca_trainer.models import harmon, janus, openuni, qwen_image, registry, show_o
from reca_trainer.models.auto import open_lazily
from reca_trainer.models.weights import CheckpointError
from reca_trainer.saving.merge import merge_adapter
from reca_trainer.toy.tokenizer import make_tokenizer
from tests.conftest import GOLDEN
from tests.models import sketch_family

# What users would read at every step: arguments that the newest transformers renames.
pytestmark = pytest.mark.filterwarnings("error:.*is deprecated and will be removed in version:FutureWarning")

TASKS = {
    **dict.fromkeys(("bagel", "embedded", "lance", "qwen_image"), ("reconstruct", "caption", "generate", "edit")),
    **dict.fromkeys(("harmon", "janus", "openuni", "show_o", "show_o_plain"), ("reconstruct", "caption", "generate")),
    "sketch": ("reconstruct", "generate"),
}
CASES = [(family, task) for family, tasks in TASKS.items() for task in tasks]
ANY_SIZE = ("bagel", "embedded", "harmon", "lance", "openuni", "qwen_image")  # the others make targets of one size
FORMS = [
    *[(family, task, "texts") for family, task in CASES],
    *[(family, task, "dropped") for family, task in CASES if task in ("reconstruct", "generate")],
    *[(family, task, "wide") for family, task in CASES if family in ANY_SIZE and task in ("reconstruct", "generate")],
    *[(family, task, "conversations") for family, task in CASES if task == "caption"],
]
TEXTS = ["a red circle", "a small blue square at the left of a green triangle", "nothing, but a red background"]
QUESTIONS = ["What is this?", "How many objects are in the scene, and where are they?", "Describe it."]
RNG = np.random.default_rng(0)
PICTURES = [
    Image.fromarray(RNG.integers(0, 255, (height, width, 3), dtype=np.uint8))
    for width, height in ((48, 36), (64, 64), (30, 50))
]


def conversation(*contents):
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


CONVERSATIONS = [
    conversation("<image>\nWhat is this?", "a red circle"),
    conversation("<image>\nHow many objects?", "two", "Where are they?", "at the left", "What colour?", "blue"),
    conversation("<image>\nDescribe it.", "nothing, but a red background", "Is it large?", "no"),
]


@functools.cache
def build(family):
    """In eval mode; shared, so tests that change a model take a `fresh` one."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    if family == "bagel":
        folder = GOLDEN / "bagel" / "checkpoint"
        sizes = {"generation_size": (64, 32, 16), "condition_size": (42, 42, 14), "understanding_size": (70, 28, 14)}
        model = AutoUnifiedModel.from_pretrained(folder)
        processor = AutoUnifiedProcessor.from_pretrained(folder, **sizes)
    elif family == "embedded":
        model, processor = toy.load()
    elif family == "harmon":
        config = harmon.Config.tiny(len(tokenizer))
        config.text_config.initializer_range = 0.2  # else a new model looks the same whatever it reads
        model, processor = harmon.Model(config), harmon.Processor.tiny(config, tokenizer)
        for parameter in model.mar.diffloss.parameters():  # a new head ignores its condition
            torch.nn.init.normal_(parameter, std=0.05)
    elif family == "janus":
        config = janus.Config.tiny(len(tokenizer) + 6, image_size=16)
        model, processor = janus.Model(config), janus.Processor.tiny(config, tokenizer)
    elif family == "lance":
        folder = GOLDEN / "lance" / "checkpoint"
        resolutions = {"reconstruct": 64, "edit": 64, "caption": 96, "answer": 96}
        model = AutoUnifiedModel.from_pretrained(folder)
        processor = AutoUnifiedProcessor.from_pretrained(folder, resolution=64, understanding_resolutions=resolutions)
    elif family == "openuni":
        config = openuni.Config.tiny(len(tokenizer) + 3)
        model, processor = openuni.Model(config), openuni.Processor.tiny(config, tokenizer)
    elif family == "qwen_image":
        config = qwen_image.Config.tiny(len(tokenizer) + 1)
        config.text_encoder_config.text_config.initializer_range = 0.2  # as Harmon's
        model, processor = qwen_image.Model(config), qwen_image.Processor.tiny(config, tokenizer)
    elif family == "sketch":
        model, processor = sketch_family.Model(sketch_family.Config()), sketch_family.Processor(tokenizer)
    else:
        config = show_o.Config.tiny(
            len(tokenizer), tokenizer.eos_token_id, image_size=16, w_clip_vit=family == "show_o"
        )
        config.text_config.initializer_range = 0.2
        model, processor = show_o.Model(config), show_o.Processor.from_config(tokenizer, config)
    return model.eval(), processor


def fresh(family):
    model, processor = build(family)
    return copy.deepcopy(model), processor


def make_batch(processor, task, form="texts", samples=(0, 1, 2)):
    """The batch of some samples: pictures of three shapes, texts of three lengths."""
    columns = {"images": PICTURES}
    if task == "edit":  # pictures of a pair, and all sources, have one shape
        pictures = [picture.resize((48, 36)) for picture in PICTURES]
        columns["images"] = list(zip(pictures, pictures[::-1], strict=True))
    if form == "conversations":
        columns["text"] = CONVERSATIONS
    elif task == "caption":
        columns |= {"text": TEXTS, "instruction": QUESTIONS}
    else:
        columns["instruction" if task == "reconstruct" else "text"] = TEXTS
    if form == "dropped":
        columns["dropped"] = [False, True, False]
    wide = (12, 36) if getattr(processor, "generation_size", ())[-1:] == (12,) else (16, 32)
    size = None if task == "caption" else wide if form == "wide" else processor.target_size(48, 36)
    rows = {name: [values[sample] for sample in samples] for name, values in columns.items()}
    return processor(**rows, task=task, size=size)


def draw(model, batch, samples=(0, 1, 2)):
    return model.sample_corruption(batch, [torch.Generator().manual_seed(11 + sample) for sample in samples])


def run(model, batch, samples=(0, 1, 2)):
    return model(**batch, corruption=draw(model, batch, samples))


def within(name, modules):
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def grey_levels(images):
    return torch.stack([torch.from_numpy(np.asarray(image).astype(int)) for image in images])


def test_every_registered_family_is_tested_with_all_its_tasks():
    models = {family: build(family)[0] for family in TASKS}
    assert {family: model.tasks for family, model in models.items()} == TASKS
    assert {module.Model for module in map(registry.family, registry.families())} == set(map(type, models.values()))


@torch.no_grad()
@pytest.mark.parametrize(("family", "task", "form"), FORMS)
def test_a_batch_is_the_weighted_mean_of_its_samples(family, task, form):
    model, processor = build(family)
    batch = make_batch(processor, task, form)
    corruption = draw(model, batch)
    together, count = model(**batch, corruption=corruption), model.count_supervised(batch, corruption)
    losses, counts = [], []
    for sample in (0, 1, 2):
        single = make_batch(processor, task, form, [sample])
        draws = draw(model, single, [sample])
        for name, value in draws.items():
            assert torch.equal(value[0], corruption[name][sample]), name
        losses.append(model(**single, corruption=draws).loss)
        counts.append(model.count_supervised(single, draws))
    losses, shares = torch.stack(losses), torch.tensor(counts) / count
    assert count == sum(counts)
    assert losses.diff().abs().min() > 1e-4  # otherwise any weights would do
    assert len(set(counts)) > 1 or not ("labels" in batch or "mask" in corruption)
    torch.testing.assert_close(together.per_sample_loss, losses, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(together.loss, (losses * shares).sum(), rtol=2e-6, atol=1e-5)
    if family == "harmon" and "mask" in corruption:  # `target` has all tokens, and several draws of each
        assert together.target[:, 0, :, 0][corruption["mask"]].numel() == count < together.target[:, 0, :, 0].numel()
    else:
        assert together.target.numel() == count


@torch.no_grad()
@pytest.mark.parametrize(("family", "task"), [(family, task) for family, task, form in FORMS if form == "dropped"])
def test_a_dropped_text_leaves_its_own_sample_without_it_and_no_other(family, task):
    model, processor = build(family)
    kept, dropped = (run(model, make_batch(processor, task, form)).per_sample_loss for form in ("texts", "dropped"))
    torch.testing.assert_close(dropped[[0, 2]], kept[[0, 2]], rtol=2e-6, atol=1e-5)
    assert abs(dropped[1] - kept[1]) > 1e-4


@pytest.mark.parametrize("family", TASKS)
def test_a_processor_without_other_arguments_is_the_same(family):
    _, processor = build(family)
    batch, again = (make_batch(p, "reconstruct") for p in (processor, processor.with_arguments()))
    assert batch.keys() == again.keys()
    for name, value in batch.items():
        if torch.is_tensor(value):
            assert torch.equal(again[name], value), name


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
    model.train()
    fixed = [*model.understanding_modules, *model.frozen_modules]
    assert not [name for name, module in model.named_modules() if module.training and within(name, fixed)]
    assert any(module.training and within(name, model.generation_modules) for name, module in model.named_modules())
    model.freeze_understanding()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if within(name, model.generation_modules)}
    assert frozen and {name for name in dict(model.named_parameters()) if within(name, fixed)} <= frozen.keys()
    model(**make_batch(processor, "reconstruct")).loss.backward()
    torch.optim.SGD((p for p in model.parameters() if p.grad is not None), lr=1.0).step()
    assert all(torch.equal(model.get_parameter(name), before) for name, before in frozen.items())
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= trainable


@pytest.mark.parametrize("family", TASKS)
def test_lora_touches_exactly_its_targets(family):
    model, processor = fresh(family)
    targets = {name for name, _ in model.named_modules() if re.fullmatch(model.lora_target_modules, name)}
    assert targets and all(within(name, model.generation_modules) for name in targets)
    adapted = attach(model, LoraConfig(r=2))
    touched = {name for name, module in adapted.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert touched == targets
    run(adapted.get_base_model(), make_batch(processor, "reconstruct")).loss.backward()
    assert {name for name, p in adapted.named_parameters() if p.grad is not None} == {
        name for name, _ in adapted.named_parameters() if "lora_" in name
    }


@pytest.mark.parametrize("family", TASKS)
def test_some_of_what_is_trained_decays_and_some_does_not(family):
    model, _ = fresh(family)
    model.freeze_understanding()
    assert {model.decays(name, p.shape) for name, p in model.named_parameters() if p.requires_grad} == {True, False}


@pytest.mark.parametrize("family", [family for family in TASKS if family != "sketch"])
def test_activation_checkpointing_recomputes_layers_and_changes_nothing(family):
    model, processor = fresh(family)
    model.freeze_understanding()
    model.train()
    batches = [make_batch(processor, task) for task in model.tasks]
    calls, results = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        losses = [run(model, batch).loss for batch in batches]
        with register_module_forward_pre_hook(lambda *_: calls.append(1)):
            sum(losses).backward()
        assert bool(calls) == checkpointing
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((losses, gradients))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", TASKS)
def test_the_three_encodings(family):
    model, processor = build(family)
    batch = make_batch(processor, "reconstruct")
    condition = model.encode_condition(batch.get("condition_pixel_values", batch["pixel_values"]))
    torch.testing.assert_close(model(**batch).understanding_embeds, condition)
    assert condition.is_floating_point() and condition.ndim == 3
    target = model.encode_target(batch["pixel_values"])
    assert target.is_floating_point() or (target.dtype == torch.int64 and target.ndim == 2)
    assert model.decode_target(target).shape == batch["pixel_values"].shape


@torch.no_grad()
@pytest.mark.parametrize("family", TASKS)
def test_a_merged_adapter_is_the_model_with_the_adapter(family, tmp_path):
    model, processor = fresh(family)
    torch.manual_seed(0)
    adapted = attach(model, LoraConfig(r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    merge_adapter(build(family)[0], tmp_path / "adapter", tmp_path / "merged", processor=processor)
    merged = AutoUnifiedModel.from_pretrained(tmp_path / "merged").eval()
    processor = AutoUnifiedProcessor.from_pretrained(tmp_path / "merged")
    for task in model.tasks:
        batch = make_batch(processor, task)
        expected = run(adapted.get_base_model(), batch).per_sample_loss
        changed = (run(build(family)[0], batch).per_sample_loss - expected).abs().min() > 1e-4
        assert changed == (task != "caption" or model.shares_weights)
        torch.testing.assert_close(run(merged, batch).per_sample_loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "task"), [case for case in CASES if case[1] != "caption"])
def test_every_picture_is_generated_as_alone(family, task):
    model, processor = fresh(family)
    model.train()
    columns = {"text": TEXTS}
    if task != "generate":
        columns["images"] = PICTURES
    options = {} if family == "janus" else {"num_inference_steps": 3}  # Janus takes one per token

    def generate(samples):
        rows = {name: [values[sample] for sample in samples] for name, values in columns.items()}
        generators = [torch.Generator().manual_seed(sample) for sample in samples]
        return model.generate_images(processor, **rows, task=task, generator=generators, **options)

    together = generate((0, 1, 2))
    for sample, picture in enumerate(together):
        (alone,) = generate([sample])
        assert picture.size == alone.size
        assert processor.fixed_size in (None, (picture.height, picture.width))
        assert (grey_levels([picture]) - grey_levels([alone])).abs().max() <= 1  # rounding of sums of other sizes
    assert together[0].tobytes() != together[1].tobytes()
    assert model.training and not any(model.get_submodule(name).training for name in model.frozen_modules)


@pytest.mark.parametrize("family", [family for family, task in CASES if task == "caption"])
def test_every_question_is_answered_as_alone(family):
    model, processor = build(family)
    for pictures in (PICTURES, None):
        answers = [
            model.generate_text(processor, QUESTIONS[rows], pictures and pictures[rows], max_new_tokens=6)
            for rows in (slice(0, 3), slice(0, 1), slice(1, 2), slice(2, 3))
        ]
        assert answers[0] == [*answers[1], *answers[2], *answers[3]]


def refusal(load, folder):
    with pytest.raises(CheckpointError) as error:
        load(folder)
    return str(error.value)


@pytest.mark.parametrize("family", list(TASKS))
def test_both_loaders_take_and_refuse_the_same_checkpoints(family, tmp_path):
    """The loader that fills the memory, and the one that leaves the weights on disk."""
    model, _ = build(family)
    model.save_pretrained(tmp_path)
    loaded, lazy = AutoUnifiedModel.from_pretrained(tmp_path).state_dict(), open_lazily(tmp_path).lazy_weights
    assert lazy.keys() == load_file(tmp_path / "model.safetensors").keys() <= loaded.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
        assert name not in lazy or torch.equal(lazy[name][...], tensor.to(lazy[name][...].dtype)), name

    weights = load_file(tmp_path / "model.safetensors")
    parts = {".".join(name.split(".")[:2]): name for name in weights}  # one weight of every part of the model
    strays = {f"{name.split('.')[0]}.stray" for name in weights}
    damages = {
        "missing": (parts.values(), {name: weights[name] for name in weights.keys() - parts.values()}),
        "wrongly shaped": (parts.values(), weights | {name: torch.zeros(3, 5, 7) for name in parts.values()}),
        "unexpected": (strays, weights | {name: torch.zeros(1) for name in strays}),
    }
    for damage, (names, damaged) in damages.items():
        save_file(damaged, tmp_path / "model.safetensors", metadata={"format": "pt"})
        message = refusal(AutoUnifiedModel.from_pretrained, tmp_path)
        assert f"{damage} ({len(names)}): " in message
        assert all(name in message for name in sorted(names)[:20])  # the others are only counted
        assert refusal(open_lazily, tmp_path) == message


SIZES = [(1, 1), (3, 200), (200, 3), (48, 36), (640, 480)]


@pytest.mark.parametrize("family", TASKS)
def test_the_size_of_targets(family):
    _, processor = build(family)
    sizes = [processor.target_size(*size) for size in SIZES]
    longest, shortest = (36, 12) if family == "embedded" else (32, 16)  # whole patches
    bounds = {"max_image_size": longest, "min_image_size": shortest}
    if processor.fixed_size is None:
        assert len(set(sizes)) > 1
        bounded = [processor.target_size(*size, **bounds) for size in SIZES]
        assert max(map(max, bounded)) <= longest and min(bounded[-1]) >= shortest
    else:
        assert set(sizes) == {processor.fixed_size}
        for name, value in bounds.items():
            with pytest.raises(ValueError, match="pixels only; leave max_image_size and min_image_size out"):
                processor.target_size(48, 36, **{name: value})


@torch.no_grad()
@pytest.mark.parametrize(("family", "task"), CASES)
def test_whole_pictures_of_any_size_are_learned_from(family, task):
    model, processor = build(family)
    for size in SIZES:
        picture = Image.effect_noise(size, 60).convert("RGB")
        texts = {"instruction": ["Describe it."]} if task == "reconstruct" else {"text": ["a red circle"]}
        batch = processor(images=[(picture, picture) if task == "edit" else picture], **texts, task=task)
        if task != "caption":
            assert batch["pixel_values"].shape == (1, 3, *processor.target_size(*size))
            assert batch["pixel_values"].dtype == torch.float32 and batch["pixel_values"].abs().max() <= 1
        assert run(model, batch, [0]).loss.isfinite()


EXCHANGE = conversation("<image>\nWhat is this?", "a red circle")
LEADING = {"role": "assistant", "content": "a blue square"}


@torch.no_grad()
@pytest.mark.parametrize("family", TASKS)
@pytest.mark.parametrize(
    ("messages", "may_be_learned"),
    [
        (EXCHANGE, True),
        (CONVERSATIONS[1], True),
        (EXCHANGE[:1], False),
        ([], False),
        ([{"role": "system", "content": "Be brief."}, *EXCHANGE], None),
        ([LEADING, *EXCHANGE], None),
        ([LEADING, *EXCHANGE[:1]], None),
        ([*EXCHANGE, {"role": "user", "content": "Where is it?"}], None),
        (conversation("<image>\nWhat is this?", ""), None),
        (conversation("<image>\nWhat is this?", " \n"), None),
        (conversation("<image>", "a red circle"), None),
        (conversation("What is this?", "a red circle"), None),
        (conversation("What is this?", "a red circle", "<image>\nWhere is it?", "at the left"), None),
        (conversation("<image>\n<image>\nWhat is this?", "a red circle"), None),
        (conversation("<image>\nWhat is this?", "a red circle", "<image>\nWhere is it?", "at the left"), None),
        (conversation("<image>\n" + "What is this? " * 500, "a red circle"), None),
    ],
)
def test_a_conversation_has_a_problem_or_can_be_learned_from(family, messages, may_be_learned):
    model, processor = build(family)
    before = copy.deepcopy(messages)
    problem = processor.conversation_problem(messages)
    assert messages == before
    assert may_be_learned is None or may_be_learned == (problem is None)
    if problem is not None:
        assert 0 < len(problem) < 80 and "\n" not in problem
    elif "caption" in model.tasks:
        batch = processor(images=PICTURES[:2], text=[messages, EXCHANGE], task="caption")
        assert run(model, batch, [0, 1]).per_sample_loss.isfinite().all()
        assert (batch["labels"][:, 1:] != -100).any(dim=1).all()
