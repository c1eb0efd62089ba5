"""A share of the condition's embeddings is dropped in training."""

import pytest
import torch

from reca_trainer import RecAConfig
from reca_trainer.models.common.condition_dropout import draw_condition_dropout, drop_condition
from tests import test_option_effects
from tests.models.test_contract import TASKS, build, draw, fresh, make_batch
from tests.test_freeze import make

FAMILIES = [family for family in TASKS if family != "sketch"]


def draws(model, batch, samples, share):
    generators = [torch.Generator().manual_seed(70 + sample) for sample in samples]
    return draw(model, batch, samples) | draw_condition_dropout(share, len(generators), generators)


def kept_by(corruption, places):
    return drop_condition(corruption, None, places).bool() & places


@pytest.mark.parametrize("share", [0.1, 0.25, 0.85, 0.999])
def test_the_number_is_exact_and_hangs_on_no_other_token(share):
    corruption = draw_condition_dropout(share, 3, [torch.Generator().manual_seed(seed) for seed in range(3)])
    lengths = [37, 256, 40]
    places = torch.arange(300) < torch.tensor(lengths)[:, None]
    kept = kept_by(corruption, places)
    assert kept.sum(1).tolist() == [length - int(length * share + 0.5) for length in lengths]
    moved = kept_by(corruption, places.roll(11, dims=1))
    assert torch.equal(moved.roll(-11, dims=1), kept)
    assert not torch.equal(kept[0, :37], kept[2, :37]) or share == 0.999
    mask = torch.ones(3, 300, dtype=torch.long)
    mask[:, 290:] = 0
    masked = drop_condition(corruption, mask, places)
    assert torch.equal(masked, mask * (kept | ~places).long()) and mask[:, :290].all()
    assert drop_condition({}, mask, places) is mask and drop_condition({}, None, places) is None


def test_every_embedding_is_dropped_as_often_as_any_other():
    generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    kept = kept_by(draw_condition_dropout(0.25, 4000, generators), torch.ones(4000, 8, dtype=torch.bool)).double()
    assert (kept.mean(0) - 0.75).abs().max() < 4 * (0.75 * 0.25 / 4000) ** 0.5
    together = (kept.T @ kept / 4000 - 6 * 5 / (8 * 7)).fill_diagonal_(0)
    assert together.abs().max() < 4 * (0.25 / 4000) ** 0.5


# Qwen-Image drops behind its language model, which is what it keeps of a picture on disk: see `test_qwen_image.py`.
@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen_image"])
def test_what_is_dropped_is_not_read_and_what_is_kept_is(family, monkeypatch):
    model, processor = build(family)
    batch = make_batch(processor, "reconstruct", samples=(1,))
    corruption = draws(model, batch, (1,), 0.5)
    plain = draw(model, batch, (1,))
    assert all(torch.equal(value, corruption[name]) for name, value in plain.items())
    loss = model(**batch, corruption=corruption).loss
    assert loss != model(**batch, corruption=plain).loss
    name = "understand" if family == "harmon" and "condition_pixel_values" not in batch else "encode_condition"
    encode = getattr(type(model), name)

    def disturbed(which):
        def encode_other(self, *args):
            embeds = encode(self, *args)
            kept = kept_by(corruption, torch.ones(embeds.shape[:2], dtype=torch.bool))
            return torch.where((kept if which == "kept" else ~kept)[..., None], embeds.roll(1, -1), embeds)

        monkeypatch.setattr(type(model), name, encode_other)
        return model(**batch, corruption=corruption).loss

    assert disturbed("dropped") == loss
    assert disturbed("kept") != loss


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_drops_what_its_samples_drop(family):
    model, processor = build(family)
    batch = make_batch(processor, "reconstruct", "dropped")
    losses = model(**batch, corruption=draws(model, batch, (0, 1, 2), 0.4)).per_sample_loss
    for sample in range(3):
        single = make_batch(processor, "reconstruct", "dropped", (sample,))
        torch.testing.assert_close(
            model(**single, corruption=draws(model, single, (sample,), 0.4)).loss, losses[sample], rtol=1e-4, atol=1e-5
        )


def test_a_run_drops_in_training_alone(tmp_path):
    runs = {
        share: make(tmp_path / str(share), "openuni", condition_token_dropout=share, logging_steps=1)
        for share in (0.0, 0.5)
    }
    held_out, logs = {}, {}
    for share, trainer in runs.items():
        held_out[share] = trainer.evaluate(trainer.images)["eval_loss"]
        trainer.train()
        logs[share] = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert held_out[0.0] == held_out[0.5]
    assert logs[0.0] != logs[0.5]


def test_what_cannot_be_is_refused(tmp_path):
    for options, problem in (
        ({"condition_token_dropout": 1.0}, "a share below 1"),
        ({"condition_token_dropout": 0.5, "reca_weight": 0.0, "text_to_image_weight": 1.0}, "reca_weight is 0"),
    ):
        with pytest.raises(ValueError, match=problem):
            RecAConfig(output_dir=str(tmp_path), use_cpu=True, **options)
    with pytest.raises(
        ValueError, match=r"condition_token_dropout=0\.5: Model reads its whole condition\. Leave it 0"
    ):
        test_option_effects.make(tmp_path, condition_token_dropout=0.5)
    assert all(fresh(family)[0].supports_condition_token_dropout for family in FAMILIES)
