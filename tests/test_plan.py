"""The memory and cost model: against real runs on this machine, and its arithmetic."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from PIL import Image

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor, plan
from reca_trainer.adapters import attach, freeze
from reca_trainer.cli.plan import main
from reca_trainer.models import harmon, janus, openuni, qwen_image, show_o
from reca_trainer.models.auto import open_lazily
from reca_trainer.models.precision import default_precision
from reca_trainer.toy.tokenizer import make_tokenizer
from tests.conftest import GOLDEN

CHECKPOINT = GOLDEN / "bagel" / "checkpoint"
TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id
TINY = {
    "bagel": lambda: AutoUnifiedModel.from_pretrained(CHECKPOINT),
    "harmon": lambda: harmon.Model(harmon.Config.tiny(len(TOKENIZER))),
    "openuni": lambda: openuni.Model(openuni.Config.tiny(len(TOKENIZER) + 3)),
    "show_o": lambda: show_o.Model(show_o.Config.tiny(len(TOKENIZER), EOS, image_size=16)),
    "show_o without CLIP": lambda: show_o.Model(show_o.Config.tiny(len(TOKENIZER), EOS, 16, w_clip_vit=False)),
    "janus": lambda: janus.Model(janus.Config.tiny(len(TOKENIZER) + 6, image_size=16)),
    "lance": lambda: AutoUnifiedModel.from_pretrained(GOLDEN / "lance" / "checkpoint"),
    "qwen-image-edit": lambda: qwen_image.Model(qwen_image.Config.tiny(len(TOKENIZER) + 1)),
}
PROCESSORS = {
    "bagel": lambda config: AutoUnifiedProcessor.from_pretrained(CHECKPOINT, condition_size=(140, 140, 14)),
    "harmon": lambda config: harmon.Processor(harmon.Processor.tiny(config, TOKENIZER).tokenizer, image_size=64),
    "openuni": lambda config: openuni.Processor.tiny(config, TOKENIZER),
    "show_o": lambda config: show_o.Processor.from_config(make_tokenizer(), config),
    "show_o without CLIP": lambda config: show_o.Processor.from_config(make_tokenizer(), config),
    "janus": lambda config: janus.Processor.tiny(config, TOKENIZER),
    "lance": lambda config: AutoUnifiedProcessor.from_pretrained(GOLDEN / "lance" / "checkpoint"),
    "qwen-image-edit": lambda config: qwen_image.Processor.tiny(config, TOKENIZER),
}
# Billions of parameters of the checkpoint that a family's name stands for, autoencoder included.
PUBLISHED = {"bagel": "14.66", "harmon": "0.77", "openuni": "1.90", "show_o": "1.85", "janus": "7.41", "lance": "7.55"}
LARGE = {"qwen-image-edit": "29.27"}  # with an adapter, since all of it is trained on several GPUs


def batch(size: int) -> dict:
    return {
        "task": "reconstruct",
        "condition_pixel_values": torch.zeros(size, 3, 56, 56),
        "latents": torch.zeros(size, 16, 16, 16),
        "input_ids": torch.ones(1, 6, dtype=torch.long),
    }


def cost(mode: str = "full", size: int = 2, **options) -> plan.Cost:
    return plan.step_cost(open_lazily(CHECKPOINT), batch(size), mode, dtype=torch.float32, **options)


@pytest.mark.parametrize(("mode", "checkpointing"), [("full", False), ("lora", True)])
@pytest.mark.parametrize("family", TINY)
def test_what_is_counted_is_what_a_real_step_does(family, mode, checkpointing):
    """The same meter around a real step sees the same bytes and products."""
    model = TINY[family]()
    inputs = model.example_batch(2)
    draws = model.sample_corruption(inputs)
    if mode == "full":
        model.freeze_understanding()
        trained = model
    else:
        trained = attach(model, LoraConfig(r=64, lora_alpha=64))
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    meter = plan.Meter()
    meter.ignore([*model.parameters(), *model.buffers()])
    meter.follow((inputs, draws))
    with meter:
        trained(corruption=draws, **inputs).loss.backward()
    assert meter.activations <= meter.peak
    expected = plan.step_cost(
        TINY[family](), inputs, mode, dtype=torch.float32, checkpointing=checkpointing, corruption=draws
    )
    assert expected.step == pytest.approx(meter.peak, rel=0.05)
    assert expected.flops == meter.flops
    assert expected.weights == sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert expected.trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", TINY)
def test_an_example_has_the_shapes_of_a_processors_batch(family):
    model = TINY[family]()
    processor = PROCESSORS[family](model.config)
    bounds = (128, 64) if processor.fixed_size is None else (None, None)
    size = processor.target_size(300, 300, *bounds)
    real = processor(images=[Image.new("RGB", (300, 300))] * 2, instruction="describe the picture", size=size)
    if family == "bagel":
        real["input_ids"] = real["input_ids"].expand(2, -1)
    no_text = model.example_batch(2, *bounds, text_length=0)["input_ids"].shape[1]
    example = model.example_batch(2, *bounds, text_length=real["input_ids"].shape[1] - no_text)
    assert {name: getattr(value, "shape", value) for name, value in example.items()} == {
        name: getattr(value, "shape", value) for name, value in real.items()
    }
    assert all(value.dtype == real[name].dtype for name, value in example.items() if name != "task")


@pytest.mark.parametrize("family", TINY)
def test_sizes_that_a_family_cannot_make_are_refused(family):
    model = TINY[family]()
    side = model.example_batch(1)["pixel_values"].shape[-1]
    assert model.example_batch(1, side, side)["pixel_values"].shape[-1] == side
    with pytest.raises(ValueError, match="pixels"):
        model.example_batch(1, side // 2, side)


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
    single, double, quadruple = (cost(size=size, checkpointing=True).peak for size in (1, 2, 4))
    assert quadruple - double == pytest.approx(2 * (double - single), rel=0.05)


def test_qlora_holds_its_base_in_half_a_byte():
    lora, qlora = cost("lora"), cost("qlora")
    text = open_lazily(CHECKPOINT).config.text_config
    assert qlora.weights < lora.weights and qlora.trained_parameters == lora.trained_parameters
    kv = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    a_layer = 2 * text.hidden_size * (text.hidden_size + kv) + 3 * text.hidden_size * text.intermediate_size
    saved = 2 * text.num_hidden_layers * a_layer * (4 - plan.NF4_BYTES)
    assert lora.weights - qlora.weights == pytest.approx(saved)


def deep(family: str):
    """A tiny model whose stacks are deep enough to be shortened."""
    config = TINY[family]().config
    for part in vars(config).values():
        for name in ("num_hidden_layers", "encoder_depth", "decoder_depth", "num_layers"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, 5)
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:1] * 5
    with torch.device("meta"):
        return plan.family("show_o" if "show_o" in family else family).Model(config)


@pytest.mark.parametrize(("mode", "checkpointing"), [("full", False), ("lora", True)])
@pytest.mark.parametrize("family", ["bagel", "harmon", "janus"])
def test_a_shortened_stack_counts_as_a_whole_one(family, mode, checkpointing):
    shortened, whole = (
        plan.step_cost(
            deep(family), deep(family).example_batch(2), mode, checkpointing=checkpointing, autocast=True, whole=whole
        )
        for whole in (False, True)
    )
    assert len(plan.shorten(deep(family))) > 0
    for name in ("weights", "optimizer", "gradients", "flops", "parameters", "trained_parameters"):
        assert getattr(shortened, name) == getattr(whole, name), name
    assert shortened.step == pytest.approx(whole.step, rel=0.05)
    assert shortened.activations == pytest.approx(whole.activations, rel=0.05)


def test_one_pass_over_several_batches_counts_each_as_if_alone():
    together = plan.step_costs(open_lazily(CHECKPOINT), [batch(1), batch(3)], "full", dtype=torch.float32)
    assert together == [cost(size=1), cost(size=3)]


def test_what_several_processes_share():
    full = cost()
    alone, ddp = full.process(), full.process(launch="ddp", processes=8)
    assert ddp - alone == pytest.approx(full.gradients * plan.FRAGMENTATION["cuda"])
    for launch in ("fsdp2", "zero3"):
        two, many = (full.process(launch=launch, processes=count) for count in (2, 1000))
        assert two > many > full.activations + full.gathered
    assert full.process(launch="zero2", processes=1000) > full.weights
    packed = cost("qlora")
    assert packed.process(launch="fsdp2", processes=1000) > packed.unsharded > 0  # weights in 4 bits are not sharded


def test_frozen_weights_and_masters_have_their_own_precision():
    wide, narrow = (
        plan.step_cost(open_lazily(CHECKPOINT), batch(1), dtype=torch.bfloat16, masters=masters)
        for masters in (torch.float32, torch.bfloat16)
    )
    assert wide.weights - narrow.weights > 2 * wide.trained_parameters  # frozen embeddings and norms, too
    assert wide.gradients == 2 * narrow.gradients == 4 * wide.trained_parameters


def test_what_a_run_loads_is_what_is_counted(tmp_path):
    """In the precision that a full run with `bf16` keeps its weights in, with parts of the generator frozen."""
    names = ["language_model.model.layers.0.mlp_moe_gen", "time_embedder"]
    model = AutoUnifiedModel.from_pretrained(CHECKPOINT, **default_precision(bf16=True, has_adapter=False))
    model.freeze_understanding()
    freeze(model, names)
    counted = plan.step_cost(open_lazily(CHECKPOINT), batch(1), autocast=True, freeze_modules=names)
    assert counted.weights == sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert counted.trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted.gradients == 4 * counted.trained_parameters
    sharded = plan.step_cost(open_lazily(CHECKPOINT), batch(1), cast_weights=True, freeze_modules=names)
    assert (sharded.weights, sharded.gradients) == (counted.weights, counted.gradients)
    adapter = plan.step_cost(
        open_lazily(CHECKPOINT), batch(1), "lora", freeze_modules=["language_model.model.layers.0"]
    )
    assert 0 < adapter.trained_parameters < cost("lora", size=1).trained_parameters


def test_plan_command(capsys, tmp_path):
    AutoUnifiedModel.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--mode", "qlora", "--max_image_size", "64"]
    main([*options, "--gpu", "24GB"])
    asked = capsys.readouterr().out
    assert "Fits into 24 GB" in asked
    assert ("--tflops" in asked) == (not torch.cuda.is_available())  # never guesses a rate
    main([*options, "--gpu", "24 GB", "--tflops", "100", "--images_per_step", "8"])
    assert "GPU-hours for 1,000 steps" in capsys.readouterr().out
    main([*options, "--gpu", "0.5"])
    assert "Does not fit into 0.5 GB" in capsys.readouterr().out
    with pytest.raises(ValueError, match="min_image_size 128 and max_image_size 64"):
        main([*options, "--gpu", "24GB", "--min_image_size", "128"])
    with pytest.raises(SystemExit):
        main([*options, "--gpu", "a lot"])
    assert "write 24GB" in capsys.readouterr().err


def test_plan_reads_a_recipe(capsys, tmp_path):
    AutoUnifiedModel.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    given = ["--model", str(tmp_path), "--max_image_size", "64", "--min_image_size", "64", "--gpu", "24GB"]
    main(["--config", "bagel_lora", *given])
    lora = capsys.readouterr().out
    assert "an adapter of rank 64" in lora and "(frozen in bfloat16, trained in float32)" in lora
    assert "The recipe's 1: " in lora and "save_total_limit 3" in lora and "merged" in lora
    main(["--config", "bagel_full", *given, "--num_processes", "6", "--launch", "fsdp2", "--tflops", "100"])
    full = capsys.readouterr().out
    assert (
        "(frozen in bfloat16, trained in float32)" in full
        and "on each of 6 GPUs (fsdp2)" in full
        and "rank" not in full
    )
    assert "a step of 48 images" in full and "for 1,000 steps" in full
    (tmp_path / "own.yaml").write_text(
        f"model_name_or_path: {tmp_path}\nuse_peft: true\noptim: lion_8bit\nlora_r: 8\n"
    )
    main(["--config", str(tmp_path / "own.yaml"), *given[2:]])
    output = capsys.readouterr().out
    assert "rank 8" in output and "lion_8bit" in output and "frozen in float32" in output  # for want of bf16
    (tmp_path / "own.yaml").write_text("optim: galore_adamw\n")
    for words, message in (
        (["--config", "bagel_lora"], "--model says which model"),
        (["--config", str(tmp_path / "own.yaml"), "--model", "bagel"], "optim=galore_adamw"),
    ):
        with pytest.raises(SystemExit):
            main([*words, "--gpu", "24GB"])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("family", TINY)
def test_plan_of_a_folder(family, capsys, tmp_path):
    TINY[family]().save_pretrained(tmp_path)
    main(["--model", str(tmp_path), "--gpu", "24GB"])
    assert "Fits into 24 GB" in capsys.readouterr().out


@pytest.mark.parametrize("family", PUBLISHED | LARGE)
def test_plan_of_a_familys_name(family, capsys):
    mode = "lora" if family in LARGE else "full"
    main(["--model", family, "--gpu", "141GB", "--mode", mode, "--optim", "sgd"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{(PUBLISHED | LARGE)[family]} B parameters")
    assert "Fits into 141 GB" in printed
