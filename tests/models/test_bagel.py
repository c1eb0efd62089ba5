"""BAGEL beyond the reference cases: loading, batching, generation and adapters."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor
from reca_trainer.models.bagel import Config, Model, read_published, write_published
from reca_trainer.models.common.condition_dropout import draw_condition_dropout
from reca_trainer.models.weights import CheckpointError

CHECKPOINT = Path(__file__).parents[1] / "golden" / "bagel" / "checkpoint"


@pytest.fixture(scope="module")
def model():
    return AutoUnifiedModel.from_pretrained(CHECKPOINT).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoUnifiedProcessor.from_pretrained(
        CHECKPOINT, generation_size=(64, 32, 16), condition_size=(42, 42, 14), understanding_size=(70, 28, 14)
    )


def pictures(count, size=(64, 48)):
    rng = np.random.default_rng(count)
    return [Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def batch(processor, task, count):
    captions = ["a red kite", "two boats near an old stone bridge", "a lamp", "the harbour at night"][:count]
    images = pictures(count)
    if task == "edit":
        images = list(zip(images, pictures(count + 1)[:count], strict=True))
    text = None if task == "reconstruct" else captions
    return processor(images=images, text=text, instruction="Describe the picture.", task=task)


def generators(count):
    return [torch.Generator().manual_seed(index) for index in range(count)]


def settings(model):
    """The configuration without what says where and when it was saved."""
    return {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "architectures", "dtype")}


def test_save_pretrained_round_trip_is_exact(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoUnifiedModel.from_pretrained(tmp_path)
    assert type(again) is Model
    assert settings(again) == settings(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(again.latent_pos_embed.table, model.latent_pos_embed.table)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bagel"
    other = AutoUnifiedProcessor.from_pretrained(tmp_path)
    assert (other.generation_size, other.condition_size) == (processor.generation_size, processor.condition_size)
    first, second = (batch(p, "caption", 2) for p in (processor, other))
    assert torch.equal(first["input_ids"], second["input_ids"])


def test_published_round_trip_is_byte_equal(model, processor, tmp_path):
    write_published(model, processor, tmp_path)
    for name in ("ema.safetensors", "ae.safetensors"):
        written, published = load_file(tmp_path / name), load_file(CHECKPOINT / name)
        assert written.keys() == published.keys()
        for key, tensor in published.items():
            assert written[key].dtype == tensor.dtype and torch.equal(written[key], tensor), key
    again = read_published(tmp_path)
    assert settings(again) == settings(model)


def test_sharded_checkpoint_in_bfloat16(model, tmp_path):
    for path in CHECKPOINT.iterdir():
        if path.name != "ema.safetensors":
            shutil.copy(path, tmp_path)
    weights = load_file(CHECKPOINT / "ema.safetensors")
    save_torch_state_dict(weights, tmp_path, filename_pattern="model{suffix}.safetensors", max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    again = AutoUnifiedModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for name, p in again.named_parameters() if not name.startswith("vae.")} == {torch.bfloat16}
    assert {p.dtype for p in again.vae.parameters()} == {torch.float32}
    assert torch.equal(again.vae2llm.weight, model.vae2llm.weight.bfloat16())
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"lists the shard model-00002.*not there"):
        AutoUnifiedModel.from_pretrained(tmp_path)


def test_wrong_keys_are_listed(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    weights = load_file(CHECKPOINT / "ema.safetensors")
    del weights["llm2vae.bias"]
    weights["language_model.model.norm.weight"] = torch.ones(3)
    weights["stray.weight"] = torch.ones(1)
    save_file(weights, tmp_path / "ema.safetensors")
    with pytest.raises(CheckpointError) as error:
        AutoUnifiedModel.from_pretrained(tmp_path)
    message = str(error.value)
    assert "missing (1): llm2vae.bias" in message and "unexpected (1): stray.weight" in message
    assert "language_model.model.norm.weight: (3,) in the file, (64,) in the model" in message


def test_truncated_weights_and_unknown_folders_are_refused(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "cut")
    path = tmp_path / "cut" / "ema.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"ema\.safetensors cannot be read"):
        AutoUnifiedModel.from_pretrained(tmp_path / "cut")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint of a known family"):
        AutoUnifiedModel.from_pretrained(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="neither a folder on this machine nor a Hub repository id"):
        AutoUnifiedModel.from_pretrained(tmp_path / "absent")


def check_samples(model, whole, samples, **draws):
    """The losses of a batch are those of its samples, each on its own; `draws` are entries for `sample_corruption`."""
    count = len(samples)
    corruption = model.sample_corruption({**whole, **draws}, generators(count))
    with torch.no_grad():
        together = model(corruption=corruption, **whole)
        for index, sample in enumerate(samples):
            sample_draws = model.sample_corruption({**sample, **draws}, generators(count)[index : index + 1])
            alone = model(corruption=sample_draws, **sample)
            torch.testing.assert_close(alone.loss, together.per_sample_loss[index], rtol=1e-4, atol=1e-5)
    return together


@pytest.mark.parametrize("task", ["reconstruct", "generate"])
@pytest.mark.parametrize("dropped", [[False] * 4, [False, True, False, False], [True, False, False, True], [True] * 4])
def test_texts_of_different_lengths_and_dropped_ones(model, processor, task, dropped):
    words = ["Describe.", "Say what stands where in this picture.", "", "What is it?"]
    if task == "generate":
        words[2] = None  # a missing caption, which is a space
    key = "instruction" if task == "reconstruct" else "text"
    images = pictures(4)
    whole = processor(images=images, **{key: words}, task=task, dropped=dropped)
    samples = [
        processor(images=[image], **{key: [text]}, task=task, dropped=[drop])
        for image, text, drop in zip(images, words, dropped, strict=True)
    ]
    assert ("input_ids" in whole) == (not all(dropped))
    for sample, drop in zip(samples, dropped, strict=True):
        assert not (drop and "input_ids" in sample) and "attention_mask" not in sample
    check_samples(model, whole, samples)
    if not all(dropped):
        lengths = [sample["input_ids"].shape[1] if "input_ids" in sample else 0 for sample in samples]
        assert whole["attention_mask"].sum(1).tolist() == lengths


def test_a_dropped_instruction_is_none(model, processor):
    """A row whose mask is zero reads what a batch without instructions reads, and has gradients without NaN."""
    images = pictures(2)
    kept, dropped = (
        processor(images=images, instruction=["Describe.", "Describe."], task="reconstruct", dropped=drop)
        for drop in (None, [False, True])
    )
    assert "attention_mask" not in kept and dropped["attention_mask"][1].tolist() == [0] * kept["input_ids"].shape[1]
    without = processor(images=images, task="reconstruct")
    assert "input_ids" not in without
    corruption = model.sample_corruption(kept, generators(2))
    with torch.no_grad():
        losses = [model(corruption=corruption, **data).per_sample_loss for data in (kept, dropped, without)]
    torch.testing.assert_close(losses[1], torch.stack([losses[0][0], losses[2][1]]))
    assert losses[0][1] != losses[2][1]
    model.requires_grad_(True)
    model(corruption=corruption, **dropped).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("encoded", [False, True])
def test_conditions_of_different_sizes(model, processor, encoded):
    """Targets of one size, conditions of three; encoded ones are padded by the processor's batch or by a collator."""
    sizes = [(64, 48), (200, 40), (64, 48), (48, 64)]
    images = [pictures(index + 1, size)[-1] for index, size in enumerate(sizes)]
    words = ["Describe.", "Say what stands where in this picture.", "What is it?", "Describe."]
    whole = processor(images=images, instruction=words, task="reconstruct", size=(48, 64))
    samples = [
        processor(images=[image], instruction=[text], task="reconstruct", size=(48, 64))
        for image, text in zip(images, words, strict=True)
    ]
    assert isinstance(whole["condition_pixel_values"], list)
    assert len({tuple(pixels.shape) for pixels in whole["condition_pixel_values"]}) == 3
    if encoded:
        single = [model.encode_batch(sample) for sample in samples]
        assert all(sorted(tensors) == ["condition_embeds", "posterior"] for tensors in single)
        lengths = torch.tensor([tensors["condition_embeds"].shape[1] for tensors in single])
        together = model.encode_batch(whole)
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        assert torch.equal(together["condition_attention_mask"], mask)
        padded = pad_sequence([tensors["condition_embeds"][0] for tensors in single], batch_first=True)
        torch.testing.assert_close(together["condition_embeds"], padded)
        texts = {name: whole[name] for name in ("task", "input_ids", "attention_mask")}
        collated = {**texts, "condition_embeds": padded, "condition_attention_mask": mask.long()}
        collated["posterior"] = torch.cat([tensors["posterior"] for tensors in single])
        check_samples(model, collated, samples)
        whole = {**texts, **together}
    output = check_samples(model, whole, samples)
    check_samples(model, whole, samples, timesteps_per_image=2)
    assert output.understanding_embeds.shape[0] == 4


def conversation(*contents):
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_captions_with_images_anywhere(model, processor):
    rows = [
        (conversation("<image>\nWhat is it?", "A kite."), (64, 48)),
        (conversation("Look at <image> and name the tallest thing.", "The bridge, I think."), (48, 64)),
        (conversation("Name a river.", "The Orinoco.", "And here?\n<image>", "A lake."), (64, 48)),
        (conversation("Name a river.", "The Orinoco."), (64, 48)),
        (conversation("Name a sea.", "The Baltic Sea, for example."), None),
    ]
    words = [words for words, _ in rows]
    images = [size and pictures(1, size)[0] for _, size in rows]
    whole = processor(images=images, text=words, task="caption")
    assert whole["image_position"].tolist()[0] == 0 and whole["image_position"].tolist()[3:] == [-1, -1]
    samples = [
        processor(images=image and [image], text=[text], task="caption")
        for image, text in zip(images, words, strict=True)
    ]
    assert "condition_pixel_values" not in samples[3] and "image_position" not in samples[0]
    check_samples(model, whole, samples)
    only_text = processor(text=words[3:], task="caption")
    assert "condition_pixel_values" not in only_text
    check_samples(model, only_text, samples[3:])
    leading = [text for text in words if text[0]["content"].startswith("<image>")] * 2
    images = [*pictures(1), *pictures(1, (48, 64))]
    whole = processor(images=images, text=leading, task="caption")
    assert isinstance(whole["condition_pixel_values"], list) and "image_position" not in whole
    check_samples(
        model, whole, [processor(images=[i], text=[t], task="caption") for i, t in zip(images, leading, strict=True)]
    )


def test_conversations_that_teach_nothing(processor):
    twice = conversation("<image>\nWhat?", "A kite.", "And this <image>?", "The same.")
    for text, problem in (
        (conversation("<image>"), "no answer"),
        (conversation("<image>", ""), "no answer"),
        (twice, "the image in more than one message"),
    ):
        assert processor.conversation_problem(text) == problem
        with pytest.raises(ValueError, match=problem):
            processor(images=pictures(1), text=[text], task="caption")
    # Within one message further marks only divide the text; a mark in an answer is text.
    split = conversation("a <image> b <image> c", "the mark <image>")
    assert processor.conversation_problem(split) is None
    batch = processor(images=pictures(1), text=[split], task="caption")
    ids = [token for words in ("a", "b", "c", "the mark <image>") for token in processor._split(words)]
    assert batch["input_ids"].tolist() == [ids]
    assert batch["image_position"].tolist() == [len(processor._split("a"))]
    # White space goes around a mark only; what has no words but white space is a split, nothing is none.
    spaced = conversation(" <image> \n", " a ", "  b\n", "", " ", "c")
    batch = processor(images=pictures(1), text=[spaced], task="caption")
    splits = [processor._split(words) for words in (" a ", "  b\n", " ", "c")]
    assert batch["input_ids"].tolist() == [list(itertools.chain(*splits))]
    labels = [[-100, *ids[1:]] if words in (0, 3) else [-100] * len(ids) for words, ids in enumerate(splits)]
    assert batch["labels"].tolist() == [list(itertools.chain(*labels))]
    with pytest.raises(ValueError, match="caption does not"):
        processor(images=pictures(1), text=[split], task="caption", dropped=[True])


def test_what_needs_no_mask_gets_none(model, processor):
    """Equal lengths read on the path without mask tensors, which is the fastest."""
    masks = []
    layer = model.language_model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _module, args: masks.append(args[4]))
    whole = processor(images=pictures(2), instruction="Describe.", task="reconstruct")
    with torch.no_grad():
        model(**whole)
    hook.remove()
    assert [mask is None for mask in masks] == [True, False, True]  # only the text behind the image is causal
    assert masks[1].shape[:2] == (1, 1)
    assert whole["input_ids"].shape[0] == 2 and "attention_mask" not in whole
    assert processor(instruction="Describe.", task="reconstruct")["input_ids"].shape[0] == 1
    assert processor(instruction=["Describe.", "Look."], task="reconstruct")["input_ids"].shape[0] == 2


def test_target_size(processor):
    assert processor.fixed_size is None
    assert processor.target_size(640, 480) == (48, 64)
    assert processor.target_size(640, 480, max_image_size=32) == (16, 32)
    assert processor.target_size(640, 480, max_image_size=128, min_image_size=64) == (96, 128)
    assert processor.target_size(640, 480, max_image_size=16) == (16, 16)  # lowers the minimum too
    for bounds in ({"max_image_size": 8}, {"min_image_size": 15}, {"min_image_size": 65}):
        with pytest.raises(ValueError, match="at least 16 pixels"):
            processor.target_size(640, 480, **bounds)


def test_instruction_may_be_left_out(model, processor):
    with_it = batch(processor, "reconstruct", 2)
    without = processor(images=pictures(2), instruction="", task="reconstruct")
    assert "input_ids" in with_it and "input_ids" not in without
    corruption = model.sample_corruption(without, generators(2))
    with torch.no_grad():
        assert model(corruption=corruption, **without).loss != model(corruption=corruption, **with_it).loss


def test_cached_latents_stand_in_for_pixels(model, processor):
    whole = batch(processor, "reconstruct", 2)
    corruption = model.sample_corruption(whole, generators(2))
    latents = model.encode_target(whole["pixel_values"], corruption["posterior_noise"])
    cached = {name: value for name, value in whole.items() if name != "pixel_values"} | {"latents": latents}
    with torch.no_grad():
        assert torch.equal(model(corruption=corruption, **cached).loss, model(corruption=corruption, **whole).loss)


def test_lora_targets_are_the_generators_linear_layers(model, processor):
    model = AutoUnifiedModel.from_pretrained(CHECKPOINT)
    layers = model.config.text_config.num_hidden_layers
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=model.lora_target_modules))
    wrapped = [name for name, module in peft.named_modules() if hasattr(module, "lora_A")]
    assert len(wrapped) == 7 * layers and all("_moe_gen" in name for name in wrapped)
    peft(**batch(processor, "reconstruct", 2)).loss.backward()
    with_gradient = {name for name, p in peft.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in peft.named_parameters() if "lora_" in name}


def test_generation_of_a_batch_is_generation_one_by_one(model, processor):
    prompts, images = ["a red kite over the harbour", "boats"], [*pictures(1), *pictures(1, (48, 64))]
    options = {"num_inference_steps": 3, "height": 32, "width": 48}
    cases = [
        {"text": prompts},
        {"text": prompts, "images": images[:1] * 2, "task": "reconstruct"},
        {"images": images, "task": "reconstruct"},
        {"text": prompts, "images": images, "task": "edit", "image_guidance_scale": 2.0},
    ]
    for case in cases:
        together = model.generate_images(processor, **case, **options, generator=generators(2))
        for index, image in enumerate(together):
            sample = {
                name: value[index : index + 1] if isinstance(value, list) else value for name, value in case.items()
            }
            generator = generators(2)[index : index + 1]
            (alone,) = model.generate_images(processor, **sample, **options, generator=generator)
            assert image.size == (48, 32)
            assert np.abs(np.asarray(image, int) - np.asarray(alone, int)).max() <= 1
    answers = model.generate_text(processor, prompts, images[:1] * 2, max_new_tokens=6)
    assert answers == [model.generate_text(processor, [p], images[:1], max_new_tokens=6)[0] for p in prompts]


@torch.no_grad()
def test_a_condition_may_be_the_latents_of_the_autoencoder(model, processor):
    of_latents = processor.with_arguments(condition_encoder="vae")
    assert of_latents.condition_size == processor.condition_size
    reconstruction = batch(of_latents, "reconstruct", 2)
    assert torch.equal(reconstruction["source_pixel_values"], reconstruction["pixel_values"])
    corruption = model.sample_corruption(reconstruction, generators(2))
    latents, source = (
        model.encode_target(reconstruction["pixel_values"], corruption[f"{name}posterior_noise"])
        for name in ("", "source_")
    )
    context = model.read_latents(model.new_context(2), source)
    context = model.read_text(context, reconstruction["input_ids"])
    expected = model._flow_matching(context, latents, corruption)
    output = model(corruption=corruption, **reconstruction)
    assert torch.equal(output.loss, expected.loss) and output.understanding_embeds is None

    options = {"task": "reconstruct", "num_inference_steps": 2, "generator": generators(1)}
    drawn = [model.generate_images(p, "a lamp", pictures(1), **options)[0] for p in (processor, of_latents)]
    assert drawn[0].size == drawn[1].size and drawn[0].tobytes() != drawn[1].tobytes()
    with pytest.raises(ValueError, match="cache_latents keeps understanding embeddings"):
        model.encode_batch(reconstruction)
    with pytest.raises(ValueError, match="condition_token_dropout is about embeddings"):
        model(corruption=corruption | draw_condition_dropout(0.5, 2, None), **reconstruction)
    with pytest.raises(ValueError, match="'vit' or 'vae', not 'clip'"):
        processor.with_arguments(condition_encoder="clip")
    with pytest.raises(ValueError, match=r"BagelProcessor has no condition_side; it has .*condition_size"):
        processor.with_arguments(condition_side=28)


def test_edits_have_defaults_of_their_own(model, processor):
    def edit(**sampling):
        inputs = {"text": "red", "images": pictures(1), "task": "edit", "generator": generators(1)}
        (image,) = model.generate_images(processor, **inputs, num_inference_steps=8, **sampling)
        return np.asarray(image).tolist()

    original = {"image_guidance_scale": 2.0, "guidance_interval": (0.0, 1.0), "guidance_renorm": "text_channel"}
    assert edit() == edit(guidance_scale=4.0, **original)
    of_text_to_image = {"image_guidance_scale": 1.0, "guidance_interval": (0.4, 1.0), "guidance_renorm": "global"}
    for name, value in of_text_to_image.items():
        assert edit(**{name: value}) != edit()


def test_images_of_one_batch_share_a_size(processor):
    with pytest.raises(ValueError, match="come out at different sizes"):
        processor(images=[*pictures(1), *pictures(1, (48, 64))], instruction="Describe.", task="reconstruct")


def test_default_configuration_is_the_published_model():
    with torch.device("meta"):
        model = Model(Config())
    count = {
        name: sum(p.numel() for p in model.get_submodule(name).parameters())
        for name in ("language_model", "vit_model", "connector", "time_embedder", "vae2llm", "llm2vae", "vae")
    }
    assert count == {
        "language_model": 14_141_252_608,
        "vit_model": 402_552_736,
        "connector": 16_980_992,
        "time_embedder": 13_769_728,
        "vae2llm": 232_960,
        "llm2vae": 229_440,
        "vae": 83_819_683,
    }
    model.freeze_understanding()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert (sum(p.numel() for p in trained), len(trained)) == (6_539_861_056, 401)


def test_several_timesteps_of_an_image_are_several_copies_of_it(model, processor):
    whole = batch(processor, "reconstruct", 2)
    corruption = model.sample_corruption({**whole, "timesteps_per_image": 3}, generators(2))
    copies = {name: t.repeat_interleave(3, 0) if len(t) == 2 else t for name, t in whole.items() if torch.is_tensor(t)}
    posterior_noise = corruption["posterior_noise"].repeat_interleave(3, 0)
    gradients = []
    for data, draws in ((whole, corruption), (copies, {**corruption, "posterior_noise": posterior_noise})):
        model.freeze_understanding()
        model.zero_grad(set_to_none=True)
        output = model(**{**data, "task": "reconstruct"}, corruption=draws)
        output.loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        last = output.per_sample_loss
        if data is whole:
            first = last
    torch.testing.assert_close(first, last.view(2, 3).mean(1))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    once = model.sample_corruption(whole, generators(2))
    assert once["timesteps"].shape == (2,) and len(corruption["timesteps"]) == 6
