"""Learning to edit: from BAGEL's chains of images and from plain columns."""

import io
from collections import Counter
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file

from reca_trainer import RecAConfig
from reca_trainer.data import Columns, Draw, RowDataset, SamplingPlan, TaskBatchSampler
from reca_trainer.data.columns import find_edit_columns
from reca_trainer.data.edits import edit_of
from reca_trainer.data.sampling import mixed_hash
from reca_trainer.images import ImageError
from tests import test_option_effects
from tests.models.test_contract import build, draw
from tests.test_resume import losses, make

CHAINS = Columns("image_list", instruction="instruction_list", source="image_list")


def grey(level, size=(32, 24)):
    return Image.new("RGB", size, (level,) * 3)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def chains(lengths=(2, 3, 4, 2, 5, 3)):
    """Rows of BAGEL's layout: image number k of a chain is of the grey level 10 * k, step k is worded with its number."""
    return {
        "image_list": [[png(grey(10 * place)) for place in range(length)] for length in lengths],
        "instruction_list": [[[f"do {step}", f"make {step}"] for step in range(length - 1)] for length in lengths],
    }


def pairs(count=6, size=(32, 24)):
    images = [grey(10 * place, size) for place in range(count + 1)]
    return Dataset.from_dict(
        {"source_image": images[:-1], "edit_prompt": ["brighter"] * count, "edited_image": images[1:]}
    )


@pytest.fixture(scope="module")
def processor():
    return build("bagel")[1]


@pytest.fixture
def parquet(tmp_path):
    pq.write_table(pa.table(chains()), tmp_path / "chains.parquet")
    return str(tmp_path / "chains.parquet")


# --- the loss ---

RNG = np.random.default_rng(0)
PAIRS = [tuple(Image.fromarray(RNG.integers(0, 255, (36, 48, 3), dtype=np.uint8)) for _ in range(2)) for _ in range(4)]
TEXTS = ["make the circle red", "", "add a blue square at the left", "a night"]
DROPPED = [(False, False), (True, False), (False, True), (True, True)]


def make_batch(processor, samples, drops=DROPPED):
    return processor(
        images=[PAIRS[sample] for sample in samples],
        text=[TEXTS[sample] for sample in samples],
        task="edit",
        size=processor.target_size(48, 36),
        dropped=[sample == 3 for sample in samples],
        dropped_sources=[drops[sample] for sample in samples],
    )


@torch.no_grad()
@pytest.mark.parametrize("sample", range(4))
def test_bagel_reads_latents_embeddings_and_text_in_this_order(sample):
    model, processor = build("bagel")
    (source, target), (no_latents, no_embeddings) = PAIRS[sample], DROPPED[sample]
    batch = make_batch(processor, [sample])
    corruption = draw(model, batch, [sample])
    context = model.new_context(1)
    pixels = processor.to_pixels([source], processor.generation_size)
    latents = model.encode_target(pixels, corruption["source_posterior_noise"])
    context = model.skip(context) if no_latents else model.read_latents(context, latents)
    pixels = processor.to_pixels([source], processor.understanding_size)
    embeds = model.encode_condition(pixels)
    context = model.skip(context) if no_embeddings else model.read_image(context, embeds, pixels.shape[-2:])
    if TEXTS[sample] and sample != 3:
        context = model.read_text(context, processor.tokenize([TEXTS[sample]])["input_ids"])
    latents = model.encode_target(
        processor.to_pixels([target], processor.generation_size), corruption["posterior_noise"]
    )
    expected = model._flow_matching(context, latents, corruption)
    assert torch.equal(model(**batch, corruption=corruption).loss, expected.loss)


@torch.no_grad()
def test_lance_drops_a_source_as_a_whole():
    model, processor = build("lance")
    batch = make_batch(processor, [2])
    assert not batch["source_mask"].any() and "condition_mask" not in batch
    corruption = draw(model, batch, [2])
    without = {name: value for name, value in batch.items() if not name.startswith(("source", "condition"))}
    assert torch.equal(model(**batch, corruption=corruption).loss, model(**without, corruption=corruption).loss)
    assert "source_mask" not in make_batch(processor, [1])  # its latents alone are not dropped


@torch.no_grad()
@pytest.mark.parametrize("family", ["bagel", "lance"])
@pytest.mark.parametrize("timesteps", [1, 2])
def test_what_one_sample_drops_changes_no_other(family, timesteps):
    model, processor = build(family)
    together = make_batch(processor, range(4))
    corruption = draw(model, {**together, "timesteps_per_image": timesteps}, range(4))
    output = model(**together, corruption=corruption)
    for sample in range(4):
        single = make_batch(processor, [sample])
        draws = draw(model, {**single, "timesteps_per_image": timesteps}, [sample])
        torch.testing.assert_close(model(**single, corruption=draws).loss, output.per_sample_loss[sample])
    kept = make_batch(processor, range(4), [(False, False)] * 4)
    assert not torch.allclose(output.per_sample_loss[1:], model(**kept, corruption=corruption).per_sample_loss[1:])


def test_a_source_is_understood_at_the_size_of_training(processor):
    class Large(type(processor)):
        pass

    large = Large(processor.tokenizer, understanding_size=(980, 224, 14))
    batch = large(images=[(grey(1, (900, 600)), grey(2, (900, 600)))], text=["a"], task="edit", size=(32, 48))
    assert batch["condition_pixel_values"].shape[-2:] == (350, 518)  # (518, 224, 14) of BAGEL's edit recipe


# --- rows ---


def official(count):
    """Start, end and whether instructions are joined, with their probabilities: `UnifiedEditIterableDataset.parse_row`; of
    two steps in turn one is drawn."""
    outcomes = Counter()
    for start in range(count - 1):
        ends = range(start + 1, min(start + 3, count))
        for end in ends:
            share = Fraction(1, (count - 1) * len(ends))
            if end - start == 1:
                outcomes[start, end, False] += share
                continue
            outcomes[start, end - (end == count - 1), True] += share / 2
            outcomes[start, start + 1, False] += share / 4
            outcomes[start + 1, end, False] += share / 4
    return outcomes


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_edits_come_from_a_chain_as_often_as_in_the_original(count):
    record = {
        "image_list": list(range(count)),
        "instruction_list": [[f"{step}", f"{step}!"] for step in range(count - 1)],
    }
    drawn, words = Counter(), set()
    for seed in range(4000):
        edit = edit_of(Draw("edit", 0, (16, 16), mixed_hash(7, seed), ""), record, CHAINS, "row 0")
        steps = range(edit.source, edit.target)
        joined = edit.instruction.endswith(".")
        parts = edit.instruction.removesuffix(".").split(". ") if joined else [edit.instruction]
        assert [int(part.removesuffix("!")) for part in parts] == list(steps)
        drawn[edit.source, edit.target, joined] += 1
        words.add(edit.instruction)
    expected = official(count)
    assert drawn.keys() == expected.keys() and sum(expected.values()) == 1
    for outcome, share in expected.items():
        assert abs(drawn[outcome] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5 + 1e-9
    assert {f"{step}{mark}" for step in range(count - 1) for mark in ("", "!")} <= words


def test_rows_bring_source_instruction_and_target_together(parquet):
    rows = RowDataset({"edit": Dataset.from_parquet(parquet)}, {"edit": CHAINS})
    for seed in range(30):
        row = rows[Draw("edit", seed % 6, (24, 32), mixed_hash(seed), "")]
        [source] = row.source_images
        before, after = source.getpixel((0, 0))[0] // 10, row.image.getpixel((0, 0))[0] // 10
        steps = [int(word.strip(".")) for word in row.text.split() if word.strip(".").isdecimal()]
        assert steps == list(range(before, after))
    dataset = pairs()
    rows = RowDataset({"edit": dataset}, {"edit": find_edit_columns(dataset)})
    for row in (rows[Draw("edit", number, (24, 32), 5, "")] for number in range(6)):
        levels = (row.source_images[0].getpixel((0, 0))[0], row.image.getpixel((0, 0))[0])
        assert levels == (10 * row.draw.row, 10 * row.draw.row + 10) and row.text == "brighter"


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("input_image", "edit", "output_image"), Columns("output_image", instruction="edit", source="input_image")),
        (
            ("original_image", "edit_prompt", "edited_image"),
            Columns("edited_image", None, None, "edit_prompt", "original_image"),
        ),
        (
            ("source_img", "instruction", "target_img"),
            Columns("target_img", instruction="instruction", source="source_img"),
        ),
        (
            ("src_img", "edited_prompt_list", "edited_img"),
            Columns("edited_img", None, None, "edited_prompt_list", "src_img"),
        ),
    ],
    ids=["HQ-Edit", "InstructPix2Pix", "MagicBrush", "OmniEdit"],
)
def test_columns_of_published_datasets_are_known(names, columns):
    source, instruction, target = names
    words = [["brighter", "more light"]] if instruction.endswith("list") else ["brighter"]
    dataset = Dataset.from_dict({source: [grey(1)], instruction: words, target: [grey(2)], "edited_prompt": ["light"]})
    assert find_edit_columns(dataset) == columns
    assert RowDataset({"edit": dataset}, {"edit": columns})[Draw("edit", 0, (24, 32), 3, "")].text in (
        "brighter",
        "more light",
    )


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"image_list": [[png(grey(0))]]}, "has 1 images and 1 instructions"),
        ({"instruction_list": [[["do 0"]]], "image_list": [[png(grey(0))] * 3]}, "has 3 images and 1 instructions"),
        ({"image_list": [[png(grey(0)), png(grey(1, (24, 32)))]]}, "of 32 x 24, 24 x 32 pixels"),
        ({"image_list": [[png(grey(0)), b"no image"]]}, "row 0, target image"),
    ],
)
def test_a_row_that_is_no_edit_is_named(changed, problem):
    dataset = Dataset.from_dict(
        {"image_list": [[png(grey(0)), png(grey(1))]], "instruction_list": [[["do 0"]]], **changed}
    )
    with pytest.raises(ImageError, match=problem):
        RowDataset({"edit": dataset}, {"edit": CHAINS})[Draw("edit", 0, (24, 32), 3, "")]
    good = Dataset.from_dict(chains((2,)))
    both = Dataset.from_dict({name: [*dataset[name], *good[name]] for name in good.column_names})
    row = RowDataset({"edit": both}, {"edit": CHAINS}, on_bad_image="skip")[Draw("edit", 0, (24, 32), 3, "")]
    assert len(row.skipped) == 1 and row.text in ("do 0", "make 0")


def test_what_is_dropped_is_drawn_apart_for_every_sample():
    def drawn(task="edit", **options):
        plan = SamplingPlan({task: 1}, seed=3, **options)
        return [draw for batch in TaskBatchSampler({task: [(16, 16)] * 4000}, plan) for draw in batch]

    parts = Counter((d.dropped, *d.dropped_sources) for d in drawn(instruction_dropout=0.1, edit_source_dropout=0.3))
    for (text, latents, embeddings), count in parts.items():
        share = (0.1 if text else 0.9) * (0.3 if latents else 0.7) * (0.3 if embeddings else 0.7)
        assert abs(count / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert len(parts) == 8
    for options in ({}, {"shuffle": False, "instruction_dropout": 1.0, "edit_source_dropout": 1.0}):
        assert {(d.dropped, d.dropped_sources) for d in drawn(**options)} == {(False, (False, False))}
    assert {d.dropped_sources for d in drawn(edit_source_dropout=1.0)} == {(True, True)}
    assert {d.dropped_sources for d in drawn("reconstruct", edit_source_dropout=1.0)} == {(False, False)}


# --- runs ---


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_run_drops_the_share_of_sources_that_it_is_told(tmp_path, processor, share):
    trainer = make(tmp_path, pairs(), processor, reca_weight=0.0, edit_weight=1.0, edit_source_dropout=share)
    draws = [draw for batch in trainer.get_train_dataloader().batch_sampler for draw in batch]
    assert {draw.dropped_sources for draw in draws} == {(share == 1, share == 1)}


@pytest.mark.parametrize("layout", ["chains", "pairs"])
def test_both_layouts_train_mixed_with_reconstruction(tmp_path, parquet, processor, layout):
    options = {"edit_weight": 2.0, "task_mix": "reconstruct=2,edit=1", "max_steps": 3}
    if layout == "chains":
        images = Dataset.from_dict({"image": [grey(level) for level in range(6)]})
        options |= {"edit_dataset_name": parquet}
    else:
        images = pairs()
    trainer = make(tmp_path / "out", images, processor, eval_size=2, eval_strategy="steps", eval_steps=3, **options)
    assert {task: len(trainer.images.datasets[task]) for task in ("reconstruct", "edit")} == {
        "reconstruct": 4,
        "edit": 4,
    }
    trainer.train()
    logs = [
        set(entry) & {"reconstruction_loss", "edit_loss"} for entry in trainer.state.log_history if "loss" in entry
    ]
    assert logs == [{"reconstruction_loss"}, {"reconstruction_loss"}, {"edit_loss"}]
    third = next(entry for entry in trainer.state.log_history if "edit_loss" in entry)
    assert third["loss"] == pytest.approx(2 * third["edit_loss"], rel=1e-6)
    [held_out] = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    parts = held_out["eval_reconstruction_loss"], held_out["eval_edit_loss"]
    assert held_out["eval_loss"] == pytest.approx(parts[0] + 2 * parts[1], rel=1e-6)
    if layout == "chains":
        return
    # Resumed, the last step is the same to the bit.
    again = make(tmp_path / "out", images, processor, eval_size=2, eval_strategy="steps", eval_steps=3, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert losses(again) == losses(trainer)


def test_a_set_without_edits_is_evaluated_without_them(tmp_path, processor):
    images = Dataset.from_dict({"image": [grey(1), grey(2)]})
    trainer = make(tmp_path / "out", pairs(), processor, edit_weight=1.0)
    assert trainer.evaluate(images).keys() >= {"eval_loss", "eval_reconstruction_loss"}
    assert "eval_edit_loss" not in trainer.evaluate(images) and "eval_edit_loss" in trainer.evaluate(pairs())


def test_a_stream_of_edits_gives_every_edit_of_an_epoch(tmp_path, parquet, processor):
    options = {"dataset_name": parquet, "dataset_streaming": True, "reca_weight": 0.0, "edit_weight": 1.0}
    trainer = make(tmp_path / "out", None, processor, max_steps=3, per_device_train_batch_size=2, **options)
    loader = trainer.get_train_dataloader()
    sources = [source for _, batch in zip(range(3), loader, strict=False) for source in batch["sources"]]
    assert sorted(sources) == [f"row {number}" for number in range(6)]
    trainer.train()
    assert len(losses(trainer)) == 3


def test_accumulation_equals_one_large_batch(tmp_path, processor):
    weights = []
    for batch_size, accumulated in ((4, 1), (1, 4)):
        folder = tmp_path / str(batch_size)
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulated}
        trainer = make(folder, pairs(4), processor, reca_weight=0.0, edit_weight=1.0, max_steps=1, warmup_steps=0,
                       optim="sgd", learning_rate=0.1, max_grad_norm=0, save_steps=1, **options)  # fmt: skip
        trainer.train()
        weights.append(load_file(folder / "checkpoint-1" / "adapter_model.safetensors"))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-7)


def test_what_cannot_be_learned_is_refused(tmp_path, processor):
    with pytest.raises(
        ValueError, match=r"Model cannot do the task 'edit'; it can do reconstruct, generate\. Leave edit_weight 0"
    ):
        test_option_effects.make(tmp_path, edit_weight=1.0, train_dataset=pairs())
    with pytest.raises(ValueError, match="edit_dataset_name='edits' is about the editing term: set edit_weight"):
        RecAConfig(output_dir=str(tmp_path), use_cpu=True, edit_dataset_name="edits")
    with pytest.raises(ValueError, match="edit_source_dropout is a probability"):
        RecAConfig(output_dir=str(tmp_path), use_cpu=True, edit_source_dropout=1.5)
    images = Dataset.from_dict({"image": [grey(1)], "instruction": ["brighter"]})
    with pytest.raises(
        ValueError, match=r"'edit' learns from a source \(source_image, .* columns: image \(Image\), instruction"
    ):
        make(tmp_path, images, processor, edit_weight=1.0)
    with pytest.raises(
        ValueError, match=r"The task 'edit' needs an instruction column, and the dataset has none\. Pass a dataset"
    ):
        make(tmp_path, {"reconstruct": images}, processor, edit_weight=1.0)
    lacking = Dataset.from_dict({**chains((3, 2)), "instruction_list": [[["do 0"], [" "]], [["do 0"]]]})
    with pytest.raises(ValueError, match=r"(?s)1 of 2 rows have no instruction for every step.*row 0"):
        make(tmp_path, {"reconstruct": images, "edit": lacking}, processor, edit_weight=1.0)
