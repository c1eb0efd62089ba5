"""OpenUni beyond the reference cases: what is trained, what is saved, what is random, what is refused."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig

from reca_trainer.adapters import attach
from reca_trainer.models import openuni
from reca_trainer.models.auto import AutoUnifiedModel, AutoUnifiedProcessor, detect
from reca_trainer.models.openuni.configuration_openuni import INTERNVL3_1B
from reca_trainer.models.weights import CheckpointError
from reca_trainer.toy.tokenizer import make_tokenizer
from tests.conftest import GOLDEN

CHECKPOINT = GOLDEN / "openuni" / "checkpoint"
INSTRUCTION = "Describe the picture."


@pytest.fixture(scope="module")
def published():
    return AutoUnifiedModel.from_pretrained(CHECKPOINT)


@pytest.fixture
def model(published):
    return copy.deepcopy(published)


@pytest.fixture(scope="module")
def processor():
    return AutoUnifiedProcessor.from_pretrained(CHECKPOINT)


def pictures(count, size=(70, 50)):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(256, (count, size[1] // 10, size[0] // 10, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(image.numpy()).resize(size) for image in noise]


@pytest.fixture
def batch(processor):
    return processor(images=pictures(2), instruction=INSTRUCTION, task="reconstruct")


def draws(model, batch, seed=0):
    return model.sample_corruption(batch, torch.Generator().manual_seed(seed))


def same_weights(model, other):
    weights, others = model.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights)


LARGE = {
    "internvl_config": {
        **INTERNVL3_1B,
        "text_config": {
            **INTERNVL3_1B["text_config"],
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
        },
    },
    "connector_config": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 6,
        "num_attention_heads": 24,
    },
}


@pytest.mark.parametrize(
    ("config", "image_size", "parameters"),
    [
        ({}, 512, (938_193_024, 52_364_544, 591_747_872, 2_066_688, 312_250_275, 646_408_480)),
        (
            {**LARGE, "transformer_config": {"sample_size": 16}},
            512,
            (2_088_957_440, 221_910_528, 1_604_462_752, 3_541_248, 312_250_275, 1_830_307_744),
        ),
        (
            {**LARGE, "transformer_config": {"sample_size": 32, "qk_norm": "rms_norm_across_heads"}},
            1024,
            (2_088_957_440, 221_910_528, 1_604_641_952, 3_541_248, 312_250_275, 1_830_486_944),
        ),
    ],
    ids=["B-512", "L-512", "L-1024"],
)
def test_published_sizes(config, image_size, parameters):
    config = openuni.Config(**config)
    with torch.device("meta"):
        model = openuni.Model(config)
    model.freeze_understanding()
    parts = (model.internvl, model.connector, model.transformer, model.projector, model.vae)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert (*[sum(value.numel() for value in part.parameters()) for part in parts], trained) == parameters
    assert (config.image_size, config.condition_size, config.num_image_tokens) == (image_size, 448, 256)


def test_reca_step_changes_only_what_generates(model, batch):
    before = copy.deepcopy(model.state_dict())
    model.freeze_understanding()
    model.train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model(**batch, corruption=draws(model, batch)).loss.backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.split(".")[0] for key in changed} == set(model.generation_modules)
    assert "meta_queries" in changed


def test_lora_touches_exactly_the_generators_linear_layers(model, batch):
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(("connector.", "projector", "transformer."))
    }
    adapted = get_peft_model(model, LoraConfig(target_modules=model.lora_target_modules, r=2))
    assert set(adapted.targeted_module_names) == linear
    adapted.train()
    adapted(**batch, corruption=draws(model, batch)).loss.backward()
    with_gradient = {name for name, value in adapted.named_parameters() if value.grad is not None}
    assert with_gradient and all("lora_" in name for name in with_gradient)
    assert all(value.grad is not None for name, value in adapted.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("read", ["save_pretrained", "write_published"])
def test_saved_model_and_processor_are_the_same(read, model, processor, batch, tmp_path):
    if read == "save_pretrained":
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    else:
        openuni.write_published(model, processor, tmp_path)
    assert detect(tmp_path) == (openuni, read == "write_published")
    loaded = AutoUnifiedModel.from_pretrained(tmp_path)
    assert same_weights(loaded, model)
    assert torch.equal(
        loaded(**batch, corruption=draws(model, batch)).loss, model(**batch, corruption=draws(model, batch)).loss
    )
    again = AutoUnifiedProcessor.from_pretrained(tmp_path)(images=pictures(2), instruction=INSTRUCTION)
    assert all(torch.equal(again[key], batch[key]) for key in batch if key != "task")
    sampling = {"text": ["a boat"], "num_inference_steps": 2, "generator": torch.Generator().manual_seed(3)}
    image = model.generate_images(processor, **sampling)[0]
    sampling["generator"].manual_seed(3)
    assert loaded.generate_images(processor, **sampling)[0].tobytes() == image.tobytes()


def test_a_samples_draws_do_not_depend_on_its_batch(model, batch):
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    together = model.sample_corruption(batch, generators)
    alone = model.sample_corruption({"pixel_values": batch["pixel_values"][1:]}, [torch.Generator().manual_seed(6)])
    assert all(torch.equal(together[key][1:], alone[key]) for key in together)
    assert model.sample_corruption({**batch, "labels": batch["input_ids"]}) == {}
    with pytest.raises(ValueError, match="1 generators for a batch of 2"):
        model.sample_corruption(batch, generators[:1])


@pytest.mark.parametrize("task", ["reconstruct", "generate", "caption"])
def test_a_padded_batch_has_the_losses_of_its_samples(model, processor, task):
    columns = {
        "images": pictures(3),
        "instruction" if task == "reconstruct" else "text": ["Look.", "Describe every object.", "Name three things."],
    }
    if task != "caption":
        columns |= {"crop": [None, 0.9, 0.0], "dropped": [False, False, True]}
    together = processor(**columns, task=task)
    mask = together["attention_mask"]
    assert len(set(mask.sum(1).tolist())) == 3
    assert (together["input_ids"][mask == 0] == 0).all()
    assert mask[:, 0].all() == (task == "generate") and mask[:, -1].all() == (task != "generate")
    corruption = draws(model, together)
    losses = model(**together, corruption=corruption).per_sample_loss
    for row in range(3):
        alone = processor(**{name: values[row : row + 1] for name, values in columns.items()}, task=task)
        assert (alone["attention_mask"] == 1).all()
        part = {key: value[row : row + 1] for key, value in corruption.items()}
        torch.testing.assert_close(losses[row], model(**alone, corruption=part).loss, atol=1e-5, rtol=1e-4)


def test_without_images_there_is_one_prompt_per_instruction(model, processor, batch):
    instructions = ["Look.", "Describe every object."]
    whole = processor(images=pictures(2), instruction=instructions)
    prompts = processor(instruction=instructions)
    assert prompts.keys() == {"task", "input_ids", "attention_mask"}
    assert torch.equal(prompts["input_ids"], whole["input_ids"])
    assert processor(instruction="Look.")["input_ids"].shape[0] == 1
    corruption = draws(model, whole)
    cached = model.encode_batch(whole)
    assert torch.equal(
        model(**prompts, **cached, corruption=corruption).loss, model(**whole, corruption=corruption).loss
    )


def test_the_condition_reaches_the_prediction(model, processor, batch):
    corruption = draws(model, batch)
    seen = model(**batch, corruption=corruption)
    batch["condition_pixel_values"] = batch["condition_pixel_values"].flip(0)
    assert not torch.allclose(model(**batch, corruption=corruption).prediction, seen.prediction)


def test_precomputed_latents_give_the_same_loss(model, batch):
    corruption = draws(model, batch)
    loss = model(**batch, corruption=corruption).loss
    cached = model.encode_batch(batch)
    latents = model.encode_target(batch.pop("pixel_values"))
    assert torch.equal(model(**batch, latents=latents, corruption=corruption).loss, loss)
    del batch["condition_pixel_values"]
    assert torch.equal(model(**batch, **cached, corruption=corruption).loss, loss)
    assert model.count_supervised({**batch, **cached}, corruption) == latents.numel()


def test_prompts_of_one_length_need_no_attention_mask(model, batch):
    corruption = draws(model, batch)
    expected = model(**batch, corruption=corruption).loss
    del batch["attention_mask"]
    assert torch.equal(model(**batch, corruption=corruption).loss, expected)


def test_bfloat16_keeps_the_autoencoder_and_the_loss_in_float32(batch):
    model = AutoUnifiedModel.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    for name, part in model.named_children():
        assert {value.dtype for value in part.parameters()} == {torch.float32 if name == "vae" else torch.bfloat16}
    reference = AutoUnifiedModel.from_pretrained(CHECKPOINT)
    losses = [each(**batch, corruption=draws(each, batch)).loss for each in (model, reference)]
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=0.05, atol=0)


def test_autocast_keeps_the_loss_in_float32(model, batch):
    corruption = draws(model, batch)
    exact = model(**batch, corruption=corruption).loss
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**batch, corruption=corruption).loss
    mixed.backward()
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact, rtol=0.05, atol=0)


def test_a_quantised_generator_trains_through_lora(batch):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoUnifiedModel.from_pretrained(CHECKPOINT, quantization_config=quantization, device_map="cpu")
    quantised = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert {name.split(".")[0] for name in quantised} == {"connector", "projector", "transformer"}
    adapted = attach(model, LoraConfig(r=2))
    adapted.train()
    adapted(**batch, corruption=draws(model, batch)).loss.backward()
    gradients = {name: value.grad for name, value in adapted.named_parameters() if value.grad is not None}
    assert gradients and all("lora_" in name and value.isfinite().all() for name, value in gradients.items())


def test_published_dtypes_do_not_override_the_requested_one(folder, published):
    (folder / "internvl3-hf").unlink()
    shutil.copytree(CHECKPOINT / "internvl3-hf", folder / "internvl3-hf")
    path = folder / "internvl3-hf" / "config.json"
    path.write_text(path.read_text().replace('"float32"', '"bfloat16"'))
    assert '"torch_dtype": "bfloat16"' in path.read_text()
    assert same_weights(AutoUnifiedModel.from_pretrained(folder), published)


def test_caption_supervises_the_answer_and_its_end(model, processor):
    answers = ["A boat.", "Three red lanterns above a table."]
    batch = processor(images=pictures(2), text=answers, instruction="What is this?", task="caption")
    for row, answer in zip(batch["labels"], answers, strict=True):
        assert processor.tokenizer.decode(row[row != -100]) == answer + "<|im_end|>"
    output = model(**batch)
    assert model.count_supervised(batch, {}) == (batch["labels"] != -100).sum()
    chosen = output.prediction.log_softmax(-1).gather(-1, output.target[:, None])
    torch.testing.assert_close(output.loss, -chosen.mean())
    alone = processor(images=pictures(2)[:1], text=answers[:1], instruction="What is this?", task="caption")
    torch.testing.assert_close(output.per_sample_loss[:1], model(**alone).loss[None], atol=1e-5, rtol=1e-4)


def turns(*contents):
    return [
        {"role": "assistant" if number % 2 else "user", "content": content} for number, content in enumerate(contents)
    ]


def test_every_turn_of_a_conversation_is_learned(model, processor):
    conversation = turns("What is this?", "A boat.", "And\n<image>", "Lanterns.", "How many?", "Three.")
    batch = processor(images=pictures(1), text=[conversation], task="caption")
    (labels,), (ids,) = batch["labels"], batch["input_ids"]
    text = processor.tokenizer.decode(ids).replace("<IMG_CONTEXT>", "")
    assert text == (
        "<|im_start|>user\n<img></img>\nWhat is this?<|im_end|>\n<|im_start|>assistant\nA boat.<|im_end|>"
        "\n<|im_start|>user\nAnd<|im_end|>\n<|im_start|>assistant\nLanterns.<|im_end|>"
        "\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nThree.<|im_end|>"
    )
    assert (ids == processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")).sum() == processor.num_image_tokens
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    assert processor.tokenizer.decode(labels[labels != -100]) == "A boat.<|im_end|>Lanterns.<|im_end|>Three.<|im_end|>"
    assert model(**batch).loss.isfinite()
    caption = processor(images=pictures(1), text=["A boat."], instruction="What is this?", task="caption")
    assert torch.equal(batch["input_ids"][0, : caption["input_ids"].shape[1]], caption["input_ids"][0])


@pytest.mark.parametrize(
    ("conversation", "problem"),
    [
        (turns("<image>Why?", "So."), None),
        (turns("Why?", "So."), None),
        (turns("Why?"), "no answer"),
        (turns("Why?", "So.", "Really?"), "not questions and answers in turn"),
        (turns("Why?", "So.")[::-1], "not questions and answers in turn"),
        ([{"role": "system", "content": "Be short."}, *turns("Why?", "So.")], "not questions and answers in turn"),
        (turns("Why?", " \n", "Well?", "So."), "an empty answer"),
        (turns("<image>Why?", "So.", "And <image>?", "So too."), "more than one picture"),
    ],
)
def test_conversations_that_cannot_be_learned(conversation, problem, processor):
    assert processor.conversation_problem(conversation) == problem
    if problem:
        with pytest.raises(ValueError, match=f"conversation with {problem}"):
            processor(images=pictures(1), text=[conversation], task="caption")


@pytest.mark.parametrize("place", [None, 0.0, 0.99])
def test_a_target_is_a_square_of_the_longer_side(processor, place):
    left = {None: 10, 0.0: 0, 0.99: 20}[place]
    for turn in (False, True):
        image = Image.new("RGB", (70, 50), "black")
        image.paste("white", (left, 0, left + 50, 50))
        batch = processor(images=[image.transpose(Image.Transpose.TRANSPOSE) if turn else image], crop=[place])
        assert batch["pixel_values"].shape == (1, 3, *processor.fixed_size)
        assert (batch["pixel_values"] == 1).all()
    wide = processor(images=[image], size=(64, 128), crop=[place])
    assert wide["pixel_values"].shape == (1, 3, 64, 128)


def test_generated_images_depend_on_their_own_generator_only(model, processor):
    model.train()
    prompts = ["a small boat", "a red lantern on a table"]
    sampling = {"num_inference_steps": 2, "height": 64, "width": 96}
    both = model.generate_images(
        processor, text=prompts, generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)], **sampling
    )
    alone = model.generate_images(processor, text=prompts[1:], generator=torch.Generator().manual_seed(2), **sampling)
    assert both[1].size == (96, 64)
    levels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int() for image in (both[1], alone[0])]
    assert (levels[0] - levels[1]).abs().max() <= 1  # rounding of sums of other sizes
    assert model.training and not model.internvl.training


def test_reconstruction_is_guided_only_by_another_instruction(model, processor):
    def generate(**options):
        generator = torch.Generator().manual_seed(1)
        (image,) = model.generate_images(
            processor,
            [INSTRUCTION],
            pictures(1),
            task="reconstruct",
            num_inference_steps=2,
            generator=generator,
            **options,
        )
        return image.tobytes()

    assert generate(guidance_scale=4.0) == generate(guidance_scale=1.0)
    assert generate(guidance_scale=4.0, negative_prompt="Nothing.") != generate(guidance_scale=1.0)


def test_answers_are_greedy_unless_a_generator_draws(model, processor):
    questions = ["What is this?", "How many lanterns hang above the table?"]
    state = torch.get_rng_state()
    answers = model.generate_text(processor, questions, pictures(2), max_new_tokens=8)
    assert len(answers) == 2
    assert model.generate_text(processor, questions, pictures(2), max_new_tokens=8) == answers
    assert model.generate_text(processor, questions[1:], max_new_tokens=8) != []

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate_text(processor, questions, max_new_tokens=8, do_sample=True, generator=generator)

    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_prompts_are_cut_in_training_only(processor):
    caption = "a long caption about a boat " * 60
    training = processor(images=pictures(1), text=[caption], task="generate")
    sampling = processor(text=[caption], task="generate")
    assert training["input_ids"].shape[1] == processor.max_caption_length < sampling["input_ids"].shape[1]
    for prompt in (training, sampling):
        assert processor.tokenizer.decode(prompt["input_ids"][0]).endswith("<|im_end|>\n<|im_start|>assistant\n<img>")
    end = processor.tokenizer("<|im_end|>\n<|im_start|>assistant\n<img>")["input_ids"]
    kept = processor.max_caption_length - len(end)
    assert torch.equal(training["input_ids"][:, :kept], sampling["input_ids"][:, :kept])


def test_tokenizer_without_its_json_file_gives_the_same_ids(processor, batch, tmp_path):
    shutil.copytree(CHECKPOINT / "internvl3", tmp_path / "internvl3")
    (tmp_path / "internvl3" / "tokenizer.json").unlink()
    other = openuni.read_published_processor(CHECKPOINT, internvl=tmp_path / "internvl3")
    assert torch.equal(other(images=pictures(2), instruction=INSTRUCTION)["input_ids"], batch["input_ids"])


def test_tiny_model_trains_and_generates():
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = openuni.Config.tiny(len(tokenizer) + 3)
    model = openuni.Model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2e6
    processor = openuni.Processor.tiny(config, tokenizer)
    assert len(tokenizer) + 3 == len(processor.tokenizer)
    batch = processor(images=pictures(4), instruction=INSTRUCTION, task="reconstruct")
    assert batch["pixel_values"].shape == (4, 3, 32, 32)
    model.freeze_understanding()
    corruption = draws(model, batch)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = model(**batch, corruption=corruption).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    images = model.generate_images(processor, images=pictures(1), task="reconstruct", num_inference_steps=2)
    assert images[0].size == (32, 32)
    with pytest.raises(ValueError, match="the config expects"):
        openuni.Processor.tiny(openuni.Config.tiny(99), tokenizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": pictures(2), "instruction": ["one"]}, "1 entries for a batch of 2"),
        ({"images": pictures(2), "crop": [0.5]}, "1 entries for a batch of 2"),
        ({"images": pictures(2), "dropped": [True]}, "1 entries for a batch of 2"),
        ({"images": pictures(1), "text": ["one"], "task": "caption", "dropped": [True]}, "cannot be dropped"),
        ({"task": "generate"}, "'generate' needs text"),
        ({"text": ["one"], "task": "caption"}, "'caption' needs images"),
        ({"images": pictures(1), "text": [[{"role": "user", "content": "Why?"}]], "task": "caption"}, "no answer"),
        ({"images": pictures(2), "text": ["one"], "task": "generate"}, "as many texts as images"),
        ({"images": pictures(2), "text": ["one"], "task": "caption"}, "as many texts as images"),
        ({"images": pictures(1), "task": "translate"}, "no task 'translate'"),
    ],
)
def test_processor_refuses(arguments, message, processor):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint that may be damaged: its file is a copy, its parts are links."""
    for path in CHECKPOINT.iterdir():
        if path.is_dir():
            (tmp_path / path.name).symlink_to(path.resolve())
    for name in ("openuni_config.json", "openuni_finetune.pth"):
        shutil.copy(CHECKPOINT / name, tmp_path)
    return tmp_path


def damage(folder, change):
    weights = torch.load(folder / "openuni_finetune.pth", weights_only=True)
    change(weights)
    torch.save(weights, folder / "openuni_finetune.pth")


def test_wrapped_file_and_copies_of_frozen_weights_are_accepted(folder, published):
    weights = torch.load(folder / "openuni_finetune.pth", weights_only=True)
    weights |= {"lmm.mlp1.0.bias": torch.zeros(3), "vae.decoder.conv_in.bias": torch.zeros(3)}
    torch.save({"state_dict": weights, "meta": {"iter": 1}}, folder / "openuni_finetune.pth")
    assert same_weights(AutoUnifiedModel.from_pretrained(folder), published)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("projector.bias"), r"missing \(1\): projector.bias"),
        (lambda weights: weights.pop("transformer.proj_out.bias"), r"missing \(1\): transformer.proj_out.bias"),
        (lambda weights: weights.pop("meta_queries"), "lacks meta_queries"),
        (lambda weights: weights.update({"projector.0.bias": torch.zeros(1)}), r"unexpected \(1\): projector.0.bias"),
        (lambda weights: weights.update({"projector.bias": torch.zeros(3)}), r"wrongly shaped \(1\): projector.bias"),
    ],
)
def test_wrong_weights_are_refused_by_name(change, message, folder):
    damage(folder, change)
    with pytest.raises(CheckpointError, match=message):
        AutoUnifiedModel.from_pretrained(folder)


def test_truncated_file_is_refused(folder):
    path = folder / "openuni_finetune.pth"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        AutoUnifiedModel.from_pretrained(folder)


def test_the_file_must_be_named_when_there_are_several(folder):
    for name in ("openuni_b.pth", "openuni_l.pth"):
        shutil.copy(folder / "openuni_finetune.pth", folder / name)
    (folder / "openuni_finetune.pth").unlink()
    with pytest.raises(CheckpointError, match=r"openuni_b.pth, openuni_l.pth.*variant="):
        AutoUnifiedModel.from_pretrained(folder)
    assert AutoUnifiedModel.from_pretrained(folder, variant="openuni_l.pth") is not None


def test_an_unknown_part_must_be_named(folder):
    for name in ("internvl3", "internvl3-hf"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="pass internvl=<folder or Hub id>"):
        AutoUnifiedModel.from_pretrained(folder)


def test_another_vision_language_model_is_refused(folder):
    (folder / "internvl3-hf").unlink()
    shutil.copytree(CHECKPOINT / "internvl3", folder / "internvl3-hf")
    path = folder / "internvl3-hf" / "config.json"
    config = json.loads(path.read_text())
    for change, message in (({"ps_version": "v1"}, "pixel shuffle v2"), ({"model_type": "llava"}, "is no InternVL3")):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            AutoUnifiedModel.from_pretrained(folder)


def test_pretraining_file_leaves_sanas_published_weights(published):
    model = AutoUnifiedModel.from_pretrained(CHECKPOINT, variant="openuni_pretrain.pth")
    sana = load_file(CHECKPOINT / "sana" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, sana[key]) for key, value in model.transformer.state_dict().items())
    assert not torch.equal(published.transformer.proj_out.weight, sana["proj_out.weight"])


def test_damaged_internvl_is_refused_by_key(folder):
    (folder / "internvl3-hf").unlink()
    shutil.copytree(CHECKPOINT / "internvl3-hf", folder / "internvl3-hf")
    path = folder / "internvl3-hf" / "model.safetensors"
    weights = load_file(path)
    del weights["multi_modal_projector.linear_1.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"missing \(1\): internvl\.model\.multi_modal_projector\.linear_1\.bias"
    ):
        AutoUnifiedModel.from_pretrained(folder)
