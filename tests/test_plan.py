"""The memory and cost model: against real runs on this machine, and its arithmetic."""

from __future__ import annotations

import pytest
import torch

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor, plan
from reca_trainer.cli.plan import main
from reca_trainer.models.auto import open_lazily
from tests.conftest import GOLDEN

CHECKPOINT = GOLDEN / "bagel" / "checkpoint"


def batch(size: int) -> dict:
    return {
        "task": "reconstruct",
        "condition_pixel_values": torch.zeros(size, 3, 56, 56),
        "latents": torch.zeros(size, 16, 16, 16),
        "input_ids": torch.ones(1, 6, dtype=torch.long),
    }


def cost(mode: str = "full", size: int = 2, **options) -> plan.Cost:
    return plan.step_cost(open_lazily(CHECKPOINT), batch(size), mode, dtype=torch.float32, **options)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_what_is_counted_is_what_a_real_step_does(mode):
    """The same meter around a real step sees the same bytes and products."""
    model = AutoUnifiedModel.from_pretrained(CHECKPOINT)
    if mode == "full":
        model.freeze_understanding()
        trained = model
    else:
        trained = plan.adapters.attach(model, plan.LoraConfig(r=16, lora_alpha=16))
    model.train()
    meter = plan.Meter()
    meter.ignore([*model.parameters(), *model.buffers()])
    draws = model.sample_corruption(batch(2))
    with meter:
        trained(corruption=draws, **batch(2)).loss.backward()
    expected = cost(mode)
    assert expected.step == pytest.approx(meter.peak, rel=0.05)
    assert expected.flops == meter.flops
    assert expected.weights == sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert expected.trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_meter():
    with plan.Meter() as meter:
        left, right = torch.ones(10, 20), torch.ones(20, 30)
        product = left @ right
        del left, right
        product.view(-1).add_(1)
    assert meter.flops == 2 * 10 * 20 * 30
    assert (meter.peak, meter.live) == (4 * (200 + 600 + 300), 4 * 300)


def test_recomputing_activations_takes_less_memory_and_more_flops():
    kept, recomputed = cost(), cost(checkpointing=True)
    assert recomputed.step < 0.8 * kept.step and recomputed.flops > 1.1 * kept.flops


def test_memory_grows_evenly_with_the_batch():
    one, two, four = (cost(size=size, checkpointing=True).peak for size in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.05)


def test_qlora_holds_its_base_in_half_a_byte():
    lora, qlora = cost("lora"), cost("qlora")
    text = open_lazily(CHECKPOINT).config.text_config
    assert qlora.weights < lora.weights and qlora.trained_parameters == lora.trained_parameters
    kv = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    a_layer = 2 * text.hidden_size * (text.hidden_size + kv) + 3 * text.hidden_size * text.intermediate_size
    saved = 2 * text.num_hidden_layers * a_layer * (4 - plan.NF4_BYTES)
    assert lora.weights - qlora.weights == pytest.approx(saved)


def test_plan_command(capsys, tmp_path):
    AutoUnifiedModel.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    AutoUnifiedProcessor.from_pretrained(CHECKPOINT, condition_size=(56, 56, 14)).save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--mode", "qlora", "--resolution", "64"]
    main([*options, "--gpu", "24GB"])
    asked = capsys.readouterr().out
    assert "Fits into 24 GB" in asked
    assert ("--tflops" in asked) == (not torch.cuda.is_available())  # never guesses a rate
    main([*options, "--gpu", "24 GB", "--tflops", "100", "--images_per_step", "8"])
    assert "GPU-hours for 1,000 steps" in capsys.readouterr().out
    main([*options, "--gpu", "0.5"])
    assert "Does not fit into 0.5 GB" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*options, "--gpu", "a lot"])
    assert "write 24GB" in capsys.readouterr().err
