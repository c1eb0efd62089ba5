"""Harmon beyond the reference cases: batches of unlike samples, checkpoints, LoRA, sampling."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from reca_trainer.models import harmon
from reca_trainer.models.auto import AutoUnifiedModel, AutoUnifiedProcessor
from reca_trainer.models.harmon.mar_harmon import Visible, hidden_counts, kept_timesteps
from reca_trainer.models.weights import CheckpointError
from tests.conftest import GOLDEN

PUBLISHED = GOLDEN / "harmon" / "checkpoint"
TASKS = ("reconstruct", "generate", "caption")


@pytest.fixture(scope="module")
def processor():
    tokenizer = harmon.read_published_processor(PUBLISHED).tokenizer
    return harmon.Processor.tiny(harmon.Config.tiny(vocab_size=len(tokenizer)), tokenizer)


@pytest.fixture
def model(processor):
    torch.manual_seed(0)
    model = harmon.Model(harmon.Config.tiny(vocab_size=len(processor.tokenizer)))
    for parameter in model.mar.diffloss.parameters():  # a new head ignores its condition
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(256, (3, 6, 6, 3), generator=generator, dtype=torch.uint8).numpy()
    return [Image.fromarray(picture).resize((40, 36)) for picture in noise]


def make_batch(processor, pictures, task):
    if task == "reconstruct":
        return processor(images=pictures, instruction="Describe the image in detail.", task=task)
    texts = ["a dog", "a white dog on the left of a red boat", ""]
    return processor(images=pictures, text=texts[: len(pictures)], instruction="What is this?", task=task)


def generators(count=3):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# losses


def test_hidden_pixels_do_not_reach_the_text_to_image_prediction(model, processor, pictures):
    batch = make_batch(processor, pictures, "generate")
    corruption = model.sample_corruption(batch, generators())
    visible = Visible.of(torch.ones_like(corruption["mask"]))
    with torch.no_grad():
        latents = model.encode_target(batch["pixel_values"])
        context = model._embed(batch["input_ids"], batch["attention_mask"], None)[:2]
        prediction = model._predict(latents, visible, *context)
        other = model._predict(torch.randn_like(latents), visible, *context)
    assert torch.equal(prediction, other)


def test_captions_without_images(model, processor):
    batch = processor(text=["Yes.", "No, it is a boat."], instruction="Is it?", task="caption")
    output = model(**batch)
    assert output.understanding_embeds is None and torch.isfinite(output.loss)


def test_each_sample_may_have_its_own_question(processor, pictures):
    batch = processor(images=pictures[:2], text=["a", "b"], instruction=["one?", "two?"], task="caption")
    assert processor.tokenizer.decode(batch["input_ids"][1][4:]).startswith("\ntwo?")


def test_training_leaves_the_autoencoder_alone(model):
    model.train()
    model.freeze_understanding()
    assert not model.vae.training and model.llm.training
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"vae"}


def test_lora_is_on_every_linear_layer_of_the_generator_and_nowhere_else(model, processor, pictures):
    from peft import LoraConfig, get_peft_model

    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.startswith("vae.") and name != "llm.lm_head"
    }
    adapted = get_peft_model(model, LoraConfig(target_modules=model.lora_target_modules))
    assert set(adapted.targeted_module_names) == linear
    batch = make_batch(processor, pictures, "reconstruct")
    adapted(**batch).loss.backward()
    touched = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert touched and all("lora_" in name for name in touched)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(model, processor, pictures, dtype, tmp_path):
    batch = make_batch(processor, pictures, "reconstruct")
    corruption = model.sample_corruption(batch, generators())
    model.save_pretrained(tmp_path)
    half = AutoUnifiedModel.from_pretrained(tmp_path, dtype=dtype)
    assert half.llm.dtype == dtype and half.vae.dtype == torch.float32
    half.generate_images(processor, ["a dog"], num_inference_steps=2)
    with torch.no_grad():
        exact = model(corruption=corruption, **batch).loss
        half = half(corruption=corruption, **batch).loss
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.02, atol=0)


@pytest.mark.parametrize("task", TASKS)
def test_autocast_stays_near_float32(model, processor, pictures, task):
    batch = make_batch(processor, pictures, task)
    corruption = model.sample_corruption(batch, generators())
    exact = model(corruption=corruption, **batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(corruption=corruption, **batch).loss
    mixed.backward()
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact, rtol=0.02, atol=0)


def test_a_quantised_generator_trains_through_lora(processor, pictures):
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoUnifiedModel.from_pretrained(PUBLISHED, quantization_config=quantization, device_map="cpu")
    names = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert names and not any(name.startswith(("vae.", "mar.diffloss.", "llm.lm_head")) for name in names)
    model = prepare_model_for_kbit_training(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=model.lora_target_modules))
    adapted.train()
    processor = harmon.Processor(processor.tokenizer, image_size=64)
    for task in TASKS:
        output = adapted(**make_batch(processor, pictures, task))
        output.loss.backward()
        assert torch.isfinite(output.loss)
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch["input_ids"].masked_fill_(batch["input_ids"] == -200, 0), "placeholder"),
        (lambda batch: batch.update(task="draw"), "'draw'"),
    ],
)
def test_wrong_batches_are_refused(model, processor, pictures, change, message):
    batch = make_batch(processor, pictures, "reconstruct")
    change(batch)
    with pytest.raises(ValueError, match=message):
        model(**batch)


def test_a_caption_batch_without_supervision_is_refused(model, processor, pictures):
    batch = make_batch(processor, pictures, "caption")
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="supervised"):
        model(**batch)


# sampling


def test_linear_guidance_grows_with_the_share_of_revealed_tokens(model, processor):
    length = 64
    context = model._embed(*processor.pad(processor.prompt_ids(["a dog", ""], "generate", [False, True])), None)[:2]
    draws = model.sample_noise(1, (8, 8), torch.Generator().manual_seed(0))

    def sample(scale, schedule):
        with torch.no_grad():
            return model.sample_latents(*context, **draws, grid=(8, 8), num_inference_steps=1,
                                        guidance_scale=scale, guidance_schedule=schedule)  # fmt: skip

    # the last iteration counts one token as hidden
    assert torch.equal(sample(3.0, "linear"), sample(1 + 2 * (length - 1) / length, "constant"))
    assert not torch.equal(sample(3.0, "linear"), sample(3.0, "constant"))


@pytest.mark.parametrize("guidance_schedule", ["constant", "linear"])
def test_reconstruction_of_another_size(model, processor, pictures, guidance_schedule):
    images = model.generate_images(
        processor,
        images=pictures[:2],
        task="reconstruct",
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=100,
        guidance_schedule=guidance_schedule,
        height=16,
        width=24,
    )
    assert [image.size for image in images] == [(24, 16)] * 2


@pytest.mark.parametrize(
    "arguments",
    [{"task": "edit"}, {"text": None}, {"height": 30}, {"guidance_schedule": "cosine"}, {"task": "reconstruct"}],
)
def test_wrong_sampling_arguments_are_refused(model, processor, arguments):
    with pytest.raises(ValueError):
        model.generate_images(processor, **{"text": ["a"], **arguments})


def test_sampled_answers_follow_the_generator(model, processor, pictures):
    def answer(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate_text(
            processor, ["Why?"], pictures[:1], generator=generator, max_new_tokens=8, do_sample=True
        )

    assert answer(0) == answer(0) != answer(1)


@pytest.mark.parametrize(("length", "iterations"), [(1, 1), (16, 16), (60, 7), (1024, 64)])
def test_every_iteration_reveals_a_token(length, iterations):
    counts = [length, *hidden_counts(length, iterations)]
    assert counts[-1] == 0 and all(after < before for before, after in pairwise(counts))


@pytest.mark.parametrize("spacing", ["0", "1001", "600,500", "ddim999", "many"])
def test_impossible_spacings_are_refused(spacing):
    with pytest.raises(ValueError):
        kept_timesteps(spacing)


# pictures and prompts


def test_a_box_is_cut_at_its_place_along_the_longer_side(processor):
    red, blue = (255, 0, 0), (0, 0, 255)
    wide = Image.new("RGB", (101, 40), red)
    wide.paste(blue, (0, 0, 1, 40))  # the first column, which only the first of 62 offsets shows
    for picture in (wide, wide.transpose(Image.Transpose.TRANSPOSE)):
        places = [0.0, 1 / 62, 0.999, None]
        batch = processor(images=[picture] * 4, text=["a"] * 4, task="generate", crop=places, size=(40, 40))
        blues = (batch["pixel_values"][:, 2] == 1).sum((1, 2))
        assert blues.tolist() == [40, 0, 0, 0]
    assert processor.cut(wide, (40, 40)).tobytes() == wide.crop((30, 0, 70, 40)).tobytes()
    assert processor.cut(wide, (40, 40), 0.999).tobytes() == wide.crop((61, 0, 101, 40)).tobytes()
    assert processor.cut(wide, (20, 40), 0.0).tobytes() == wide.crop((0, 0, 80, 40)).resize((40, 20)).tobytes()


def test_only_dropped_captions_and_empty_instructions_become_the_unconditional_prompt(processor):
    fixed = processor.prompt_ids(["a dog"], "generate", [True])
    assert processor.prompt_ids(["", " ", "a dog"], "generate", [True] * 3) == fixed * 3
    assert fixed[0] not in processor.prompt_ids(["", " ", "a dog"], "generate")
    reconstruct = processor.prompt_ids(["", " ", "a dog"], "reconstruct", [False, False, True])
    place = reconstruct[0].index(processor.image_token_id)
    assert reconstruct == [[*fixed[0][:place], processor.image_token_id, *fixed[0][place:]]] * 3


def conversation(*contents, roles=("user", "assistant")):
    return [{"role": roles[place % len(roles)], "content": content} for place, content in enumerate(contents)]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (conversation("<image>\nWhat?", "A boat.", "Where?", ""), None),
        (conversation("<image>", "A boat."), None),
        (conversation("What is <image><image>?", "A boat."), None),
        (conversation("What?", "A boat."), "no image mark at the front of the first question"),
        (conversation("What?", "A boat.", "<image>\nWhere?", "Here."), "no image mark"),
        (conversation("What?", "<image>", "Yes.", roles=("user", "user", "assistant")), "no image mark"),
        (conversation("<image>", "A boat.", "<image>", "Here."), "more than one image mark"),
        (conversation("<image>", "<image>", "A boat.", roles=("user", "user", "assistant")), "two image marks"),
        (conversation("Be short.", "<image>", "A boat.", roles=("system", "user", "assistant")), "role 'system'"),
        (conversation("A boat.", "<image>", roles=("assistant", "user")), "no answer to a question"),
        (conversation(), "no answer"),
        (conversation("<image>" + "Why? " * 1500, "So."), "no answer within 1472 tokens"),
    ],
)
def test_conversations_that_teach_nothing_have_a_problem(processor, pictures, messages, problem):
    reason = processor.conversation_problem(messages)
    assert reason == problem if problem is None else problem in reason
    if problem is None:
        assert (processor(pictures[:1], [messages], task="caption")["labels"] != -100).any()
    elif "within" not in problem:
        with pytest.raises(ValueError, match=f"Conversation 0 of the batch has .*{problem}"):
            processor(pictures[:1], [messages], task="caption")


def test_conversations_about_no_picture(processor):
    batch = processor(text=[conversation("Is it?", "Yes."), "No."], instruction=["", "Is it?"], task="caption")
    assert processor.image_token_id not in batch["input_ids"] and len(batch["labels"]) == 2
    with pytest.raises(ValueError, match="an image mark, but no image"):
        processor(text=[conversation("<image>\nIs it?", "Yes.")], task="caption")


def test_all_answers_of_a_conversation_are_supervised(processor, pictures):
    turns = conversation("Look at <image> please. ", " A boat. ", " Where? ", "There.")
    batch = processor(pictures[:1], [turns], task="caption")
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == " A boat. <|im_end|>There.<|im_end|>"
    asked = processor.tokenizer.decode(ids[(labels == -100) & (ids != processor.image_token_id)])
    assert "user\n\nLook at  please.<|im_end|>" in asked and "user\n Where? <|im_end|>" in asked


@pytest.mark.parametrize(
    "arguments",
    [
        {"task": "reconstruct", "instruction": ["a"]},
        {"task": "reconstruct", "dropped": [True]},
        {"task": "generate", "text": ["a", "b"], "crop": [0.5]},
        {"task": "caption", "text": ["a", "b"], "instruction": ["?"]},
    ],
)
def test_lists_of_another_length_than_the_batch_are_refused(processor, pictures, arguments):
    with pytest.raises(ValueError, match="1 entries for a batch of 2 samples"):
        processor(images=pictures[:2], **arguments)


def test_long_prompts_keep_the_turn_around_them(processor):
    short, long = processor.prompt_ids(["a dog", "a dog and " * 200], "generate")
    assert len(long) == processor.max_prompt_length
    assert long[-5:] == short[-5:]
    assert [len(ids) for ids in processor.prompt_ids(["a dog and " * 200], "reconstruct")] == [len(long)]


def test_the_tiny_processor_brings_the_turn_markers(processor):
    letters = Tokenizer(WordLevel({letter: n for n, letter in enumerate("abc?")}, "?"))
    letters = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?")
    with pytest.raises(ValueError, match="im_end"):
        harmon.Processor(letters)
    with pytest.raises(ValueError, match="vocabulary"):
        harmon.Processor.tiny(harmon.Config.tiny(vocab_size=5), letters)
    tiny = harmon.Processor.tiny(harmon.Config.tiny(vocab_size=6), letters)
    assert tiny.fixed_size == tiny.target_size(90, 40) == (32, 32) and tiny.end_id == 5 and len(letters) == 4


def test_the_processor_comes_back_with_its_settings(processor, tmp_path):
    processor = harmon.Processor(processor.tokenizer, image_size=64, max_prompt_length=40)
    processor.tokenizer.chat_template = "{{ messages }}"
    processor.save_pretrained(tmp_path)
    processor.tokenizer.chat_template = None
    again = harmon.Processor.from_pretrained(tmp_path)
    assert (again.image_size, again.max_prompt_length, again.fixed_size) == (64, 40, (64, 64))
    assert again.prompt_ids(["a boat"], "generate") == processor.prompt_ids(["a boat"], "generate")


# checkpoints


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "published"
    shutil.copytree(PUBLISHED, folder, ignore=shutil.ignore_patterns("original"))
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


@pytest.fixture
def training_layout(tmp_path):
    folder = tmp_path / "training"
    shutil.copytree(PUBLISHED / "original", folder)
    shutil.copy(PUBLISHED / "config.json", folder)
    return folder


def test_both_published_layouts_hold_the_same_model(published, training_layout):
    model, other = AutoUnifiedModel.from_pretrained(published), AutoUnifiedModel.from_pretrained(training_layout)
    assert isinstance(model, harmon.Model) and same_weights(model, other)


def test_write_published_is_the_inverse_of_read_published(published, tmp_path):
    model = AutoUnifiedModel.from_pretrained(published, dtype=torch.bfloat16)
    harmon.write_published(model, AutoUnifiedProcessor.from_pretrained(published), tmp_path / "written")
    before, after = load_file(published / "model.safetensors"), load_file(tmp_path / "written" / "model.safetensors")
    assert before.keys() == after.keys() and all(
        torch.equal(before[key].float(), after[key].float()) for key in before
    )
    again = AutoUnifiedModel.from_pretrained(tmp_path / "written", dtype=torch.bfloat16)
    assert same_weights(model, again)
    assert {**again.config.to_dict(), "_name_or_path": ""} == {**model.config.to_dict(), "_name_or_path": ""}


def test_an_untied_text_head_survives(published, tmp_path):
    config = json.loads((published / "config.json").read_text())
    config["llm"]["tie_word_embeddings"] = False
    (published / "config.json").write_text(json.dumps(config))
    weights = load_file(published / "model.safetensors")
    weights["llm.lm_head.weight"] = weights["llm.model.embed_tokens.weight"].clone() + 1
    save_file(weights, published / "model.safetensors", metadata={"format": "pt"})
    model = AutoUnifiedModel.from_pretrained(published)
    assert torch.equal(model.llm.lm_head.weight, weights["llm.lm_head.weight"].float())
    model.save_pretrained(tmp_path / "saved")
    harmon.write_published(model, AutoUnifiedProcessor.from_pretrained(published), tmp_path / "written")
    for folder in ("saved", "written"):
        assert same_weights(model, AutoUnifiedModel.from_pretrained(tmp_path / folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("proj_in.0.bias"), r"missing \(1\): proj_in.0.bias"),
        (lambda weights: weights.update(extra=torch.zeros(1)), r"unexpected \(1\): extra"),
        (lambda weights: weights.update({"mar.fake_latent": torch.zeros(1, 3)}), r"wrongly shaped.*mar.fake_latent"),
    ],
)
def test_weights_that_do_not_fit_are_refused(published, change, message):
    weights = load_file(published / "model.safetensors")
    change(weights)
    save_file(weights, published / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        AutoUnifiedModel.from_pretrained(published)


@pytest.mark.parametrize("name", ["model.safetensors", "kl16.ckpt"])
def test_truncated_files_are_refused(published, training_layout, name):
    folder = published if name == "model.safetensors" else training_layout
    (folder / name).chmod(0o644)
    (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=name):
        AutoUnifiedModel.from_pretrained(folder)


@pytest.mark.parametrize(("key", "value"), [("type", "mar_giant"), ("patch_size", 2), ("colour", "red")])
def test_unknown_configurations_are_refused(published, key, value):
    config = json.loads((published / "config.json").read_text())
    config["mar"][key] = value
    (published / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="mar"):
        AutoUnifiedModel.from_pretrained(published)


def test_several_training_files_ask_for_a_choice(training_layout):
    name = next(training_layout.glob("harmon_*.pth")).name
    shutil.copy(training_layout / name, training_layout / "harmon_other.pth")
    with pytest.raises(CheckpointError, match="variant"):
        AutoUnifiedModel.from_pretrained(training_layout)
    assert isinstance(AutoUnifiedModel.from_pretrained(training_layout, variant="other"), harmon.Model)


def test_a_training_file_of_unknown_size_needs_a_config(training_layout):
    (training_layout / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        AutoUnifiedModel.from_pretrained(training_layout)
    with pytest.raises(CheckpointError, match="tokenizer"):
        AutoUnifiedProcessor.from_pretrained(training_layout)


@pytest.mark.parametrize(
    ("width", "trained", "total"), [(896, 704_942_880, 771_398_899), (1536, 2_494_774_048, 2_561_230_067)]
)
def test_released_sizes_have_the_published_parameter_counts(width, trained, total):
    from reca_trainer.models.harmon.conversion_harmon import _recognise, read_config

    config = read_config(_recognise({"llm.model.norm.weight": torch.zeros(width)}, "a folder"))
    with torch.device("meta"):
        model = harmon.Model(config)
    unused = model.mar.class_emb.weight.numel()
    assert sum(parameter.numel() for parameter in model.parameters()) + unused == total
    model.freeze_understanding()
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) + unused == trained
