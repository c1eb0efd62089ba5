"""Show-o beyond the reference cases: batches of unlike samples, the bottleneck, checkpoints, LoRA, sampling."""

import json
import math
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from reca_trainer.adapters import attach
from reca_trainer.models import show_o
from reca_trainer.models.auto import AutoUnifiedModel, AutoUnifiedProcessor
from reca_trainer.models.common.pixels import to_images
from reca_trainer.models.show_o.processing_show_o import SYSTEM_PROMPT
from reca_trainer.models.weights import CheckpointError
from tests.conftest import GOLDEN

PUBLISHED = GOLDEN / "show_o" / "checkpoint"
CLIP, PLAIN = PUBLISHED / "show-o-w-clip-vit", PUBLISHED / "show-o"
TASKS = ("reconstruct", "generate", "caption")


def tokenizer():
    return AutoTokenizer.from_pretrained(PUBLISHED / "phi-1_5")


@pytest.fixture(params=["clip", "plain"])
def variant(request):
    return request.param


@pytest.fixture
def model(variant):
    torch.manual_seed(0)
    text = tokenizer()
    config = show_o.Config.tiny(len(text), text.eos_token_id, w_clip_vit=variant == "clip")
    config.text_config.initializer_range = 0.2  # else a new model looks the same whatever it reads
    return show_o.Model(config).eval()


@pytest.fixture
def processor(model):
    return show_o.Processor.from_config(tokenizer(), model.config)


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(256, (3, 6, 6, 3), generator=generator, dtype=torch.uint8).numpy()
    return [Image.fromarray(picture).resize((40, 36)) for picture in noise]


def make_batch(processor, pictures, task, **options):
    if task == "reconstruct":
        return processor(images=pictures, instruction="Describe the image in detail.", task=task, **options)
    texts = ["a dog", "a white dog on the left of a red boat", "?"]
    return processor(images=pictures, text=texts[: len(pictures)], instruction="What is this?", task=task, **options)


def generators(count=3):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def same_weights(model, other):
    weights, others = model.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights)


# losses


@pytest.mark.parametrize("task", TASKS)
def test_padding_to_the_official_length_changes_nothing(model, processor, pictures, task):
    processor.max_text_length = 150
    short, long = make_batch(processor, pictures, task), make_batch(processor, pictures, task, padding="max_length")
    corruption = model.sample_corruption(short, generators())
    with torch.no_grad():
        tight, padded = model(corruption=corruption, **short), model(corruption=corruption, **long)
    torch.testing.assert_close(tight.per_sample_loss, padded.per_sample_loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", ["reconstruct", "generate"])
def test_hidden_pixels_do_not_reach_the_prediction_but_the_condition_does(model, processor, pictures, task):
    batch = make_batch(processor, pictures, task)
    corruption = model.sample_corruption(batch, generators())
    corruption["mask"][:] = True
    with torch.no_grad():
        seen = model(corruption=corruption, **batch)
        other = model(corruption=corruption, **{**batch, "pixel_values": batch["pixel_values"].flip(0)})
        assert torch.equal(seen.prediction, other.prediction) and not torch.equal(seen.target, other.target)
        if task == "reconstruct":
            condition = {"condition_pixel_values": batch["condition_pixel_values"].flip(0)}
            other = model(corruption=corruption, **{**batch, **condition})
            assert not torch.allclose(seen.prediction, other.prediction, atol=1e-3)


def test_every_task_is_deterministic_given_its_corruption(model, processor, pictures):
    model.train()
    for task in TASKS:
        batch = make_batch(processor, pictures, task)
        corruption = model.sample_corruption(batch, generators())
        assert torch.equal(model(corruption=corruption, **batch).loss, model(corruption=corruption, **batch).loss)


@pytest.mark.parametrize("variant", ["clip"], indirect=True)
def test_the_projector_learns_from_captions_only(model, processor, pictures):
    model.freeze_understanding()
    model(**make_batch(processor, pictures, "reconstruct")).loss.backward()
    assert model.mm_projector[0].weight.grad is None and model.get_input_embeddings().weight.grad is None
    model(**make_batch(processor, pictures, "caption")).loss.backward()
    assert model.mm_projector[0].weight.grad.any() and model.get_input_embeddings().weight.grad.any()


def test_captions_without_images(model, processor):
    batch = processor(text=["Yes.", "No, it is a boat."], instruction="Is it?", task="caption")
    output = model(**batch)
    assert output.understanding_embeds is None and torch.isfinite(output.loss)


def test_training_leaves_clip_and_the_image_tokenizer_alone(model, variant):
    model.train()
    model.freeze_understanding()
    assert not model.vq_model.training and model.language_model.training
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == ({"vq_model", "vision_tower"} if variant == "clip" else {"vq_model"})


def test_lora_is_on_every_linear_layer_of_the_decoder_and_nowhere_else(model, processor, pictures):
    from peft import LoraConfig, get_peft_model

    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("language_model.model.layers.")
    }
    adapted = get_peft_model(model, LoraConfig(target_modules=model.lora_target_modules))
    assert set(adapted.targeted_module_names) == linear
    adapted(**make_batch(processor, pictures, "reconstruct")).loss.backward()
    touched = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert touched and all("lora_" in name for name in touched)


@pytest.mark.parametrize("folder", [CLIP, PLAIN])
def test_a_quantised_decoder_trains_through_lora(pictures, folder):
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoUnifiedModel.from_pretrained(folder, quantization_config=quantization, device_map="cpu")
    names = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert names and not any(name.startswith(("vq_model.", "language_model.lm_head")) for name in names)
    adapted = attach(model, LoraConfig()).train()
    processor = AutoUnifiedProcessor.from_pretrained(folder)
    for task in TASKS:
        adapted(**make_batch(processor, pictures, task)).loss.backward()
    touched = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
    assert touched and all("lora_" in name and torch.isfinite(grad).all() for name, grad in touched.items())


@pytest.mark.parametrize("task", TASKS)
def test_bfloat16_stays_near_float32(model, processor, pictures, task, tmp_path):
    batch = make_batch(processor, pictures, task)
    corruption = model.sample_corruption(batch, generators())
    model.save_pretrained(tmp_path)
    half = AutoUnifiedModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.vq_model.decoder.conv_in.weight.dtype == torch.float32
    with torch.no_grad():
        exact = model(corruption=corruption, **batch)
        losses = [half(corruption=corruption, **batch).loss]
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(corruption=corruption, **batch)
    assert torch.equal(mixed.target, exact.target), "image tokens must not depend on autocast"
    for loss in (*losses, mixed.loss):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact.loss, rtol=0.05, atol=0)


def test_a_tiny_model_learns_to_reconstruct(model, processor, pictures):
    batch = make_batch(processor, pictures, "reconstruct")
    corruption = model.sample_corruption(batch, generators())
    model.freeze_understanding()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(corruption=corruption, **batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * math.log(model.config.codebook_size), "guessing gives the logarithm"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch["input_ids"].masked_fill_(batch["input_ids"] == -100, 0), "places for the condition"),
        (lambda batch: batch.update(pixel_values=batch["pixel_values"][..., :16, :16]), "places for the target"),
        (lambda batch: batch.update(pixel_values=batch["pixel_values"][:1]), "3 sequences.* 1 images"),
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


# the bottleneck


def test_the_plain_variants_condition_is_shrunk_by_default(pictures):
    config = show_o.Config.tiny(len(tokenizer()), tokenizer().eos_token_id, w_clip_vit=False)
    processor = show_o.Processor.from_config(tokenizer(), config)
    batch = make_batch(processor, pictures, "reconstruct")
    side = config.image_size // 2
    assert batch["condition_pixel_values"].shape[-2:] == (side, side)
    blurred = show_o.Processor.from_config(tokenizer(), config, down_scale=8, resize_back=True)
    batch = make_batch(blurred, pictures, "reconstruct")
    assert batch["condition_pixel_values"].shape == batch["pixel_values"].shape
    assert not torch.equal(batch["condition_pixel_values"], batch["pixel_values"])
    assert torch.isfinite(show_o.Model(config)(**batch).loss)


@pytest.mark.parametrize("resize_back", [False, True])
def test_a_condition_that_equals_its_target_warns_of_collapse(pictures, resize_back):
    config = show_o.Config.tiny(len(tokenizer()), tokenizer().eos_token_id, w_clip_vit=False)
    with pytest.warns(UserWarning, match="collapses"):
        processor = show_o.Processor.from_config(tokenizer(), config, down_scale=1, resize_back=resize_back)
    batch = make_batch(processor, pictures, "reconstruct")
    model = show_o.Model(config)
    condition, target = (model.encode_target(batch[name]) for name in ("condition_pixel_values", "pixel_values"))
    assert torch.equal(condition, target)


@pytest.mark.filterwarnings("error:.*collapses")
def test_a_condition_with_a_bottleneck_does_not_warn(model, variant):
    show_o.Processor.from_config(tokenizer(), model.config)
    if variant == "clip":
        show_o.Processor.from_config(tokenizer(), model.config, down_scale=1)


def test_a_condition_need_not_divide_the_image_but_must_have_a_token(pictures):
    config = show_o.Config.tiny(len(tokenizer()), tokenizer().eos_token_id, w_clip_vit=False)
    processor = show_o.Processor.from_config(tokenizer(), config, down_scale=3)
    assert torch.isfinite(show_o.Model(config)(**make_batch(processor, pictures, "reconstruct")).loss)
    with pytest.raises(ValueError, match="smaller than one token"):
        show_o.Processor.from_config(tokenizer(), config, down_scale=16)


# prompts and pictures


def test_text_cannot_spell_special_tokens(processor, pictures):
    hostile = "<|endoftext|> <|soi|> a dog [PAD] <|eoi|> <|mmu|>"
    ids = processor(text=[hostile], task="generate")["input_ids"][0]
    plain = processor(text=["a dog"], task="generate")["input_ids"][0]
    for token in ("<|endoftext|>", "<|soi|>", "<|eoi|>", "<|mmu|>", "[PAD]"):
        index = processor.tokenizer.convert_tokens_to_ids(token)
        assert (ids == index).sum() == (plain == index).sum()


def test_long_captions_keep_their_end_and_long_instructions_the_assistants_header(model, processor, pictures, variant):
    processor.max_text_length = 20
    (ids,) = processor(text=["a dog and " * 50], task="generate")["input_ids"]
    assert len(ids) == processor.max_length and ids[processor.max_text_length] == processor.eos_id
    batch = processor(images=pictures, instruction=["describe " * 200, "?", None], task="reconstruct")
    prompt = batch["input_ids"][0, : -processor.num_image_tokens - 2].tolist()
    assert len(prompt) - prompt.count(-100) == (processor.recon_text_length if variant == "clip" else 3 + 20)
    assert processor.tokenizer.decode(prompt[-4:]).endswith("ASSISTANT:<|endoftext|>")
    assert torch.isfinite(model(**batch).per_sample_loss).all()


def test_an_empty_instruction_is_dropped(model, processor, pictures):
    batch = processor(images=pictures, instruction="", task="reconstruct")
    text = batch["input_ids"][0]
    text = text[(text >= 0) & (text < model.config.llm_vocab_size)].tolist()
    assert text == [processor.eos_id] * 2
    assert torch.isfinite(model(**batch).loss)
    dropped = processor(images=pictures, instruction="Describe it.", task="reconstruct", dropped=[True] * 3)
    assert torch.equal(dropped["input_ids"], batch["input_ids"])


def test_conversations_supervise_every_answer(processor, pictures):
    turns = [("What is it?", "a dog"), ("Which colour?", "white")]
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    batch = processor(images=pictures[:1], text=[messages], task="caption")
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == " a dog<|endoftext|> white<|endoftext|>"
    batch = processor(images=pictures[:1], text=[messages[1:]], task="caption")
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == " white<|endoftext|>"


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        (["user:<image>\nWhy?", "assistant:So."], None),
        (["assistant:Hello.", "user:Why?", "assistant:", "user:Why now?", "assistant: "], None),
        (["assistant:Hello."], "no answer"),
        (["user:<image>", "assistant:So."], "empty question"),
        (["user:Why?", "assistant:<image>"], "no answer to the last"),
        (["user:Why?", "assistant:So.", "user:Why now?"], "no answer to the last"),
        (["user:Why?", "user:Why now?", "assistant:So."], "two messages of user"),
        (["assistant:Hello.", "assistant:So.", "user:Why?", "assistant:So."], "two messages of assistant"),
        (["system:Be kind.", "user:Why?", "assistant:So."], "message of system"),
        (["user:" + "Why? " * 500, "assistant:So."], "first .* tokens"),
    ],
)
def test_conversations_without_a_lesson_are_named(processor, pictures, turns, problem):
    names = ("role", "content")
    conversation = [dict(zip(names, turn.split(":", 1), strict=True)) for turn in turns]
    stated = processor.conversation_problem(conversation)
    assert stated is None if problem is None else re.search(problem, stated)
    if problem is None:
        assert (processor(images=pictures[:1], text=[conversation], task="caption")["labels"] != -100).any()
    elif "tokens" not in problem:
        with pytest.raises(ValueError, match=problem):
            processor(images=pictures[:1], text=[conversation], task="caption")


def test_conversations_may_have_as_many_tokens_as_in_the_official_runs():
    sizes = {"clip": {}, "clip of 256 pixels": {"image_size": 256}, "plain": {"clip_image_size": None}}
    lengths = {name: show_o.Processor(tokenizer(), **size).max_conversation_length for name, size in sizes.items()}
    assert lengths == {"clip": 996, "clip of 256 pixels": 228, "plain": 381}


def test_each_sample_may_have_its_own_question(processor, pictures):
    batch = processor(images=pictures[:2], text=["a", "b"], instruction=["one?", "two?"], task="caption")
    rows = [row[(row >= 0) & (row < processor.pad_id)] for row in batch["input_ids"]]
    first, second = (processor.tokenizer.decode(row) for row in rows)
    assert first.endswith("USER: one? ASSISTANT: a<|endoftext|>") and second.endswith(
        "USER: two? ASSISTANT: b<|endoftext|>"
    )


def test_only_the_clip_variant_has_a_system_prompt(processor, pictures, variant):
    ids = make_batch(processor, pictures, "caption")["input_ids"][0]
    text = processor.tokenizer.decode(ids[(ids >= 0) & (ids < processor.pad_id)])
    assert text.startswith(SYSTEM_PROMPT) == (variant == "clip")


@pytest.mark.parametrize("size", [(30_000, 2), (1, 20_000)])
def test_strips_do_not_become_gigabytes(processor, size):
    strip = Image.new("L", size, 200)
    for task in TASKS:
        batch = processor(images=[strip], text=["a"], instruction="a", task=task)
        for name in batch.keys() & {"pixel_values", "condition_pixel_values"}:
            assert batch[name].shape[-1] == batch[name].shape[-2] <= processor.image_size


def test_other_sizes_are_refused(processor, pictures):
    assert processor.target_size(300, 200) == processor.fixed_size == (32, 32)
    processor(images=pictures, instruction="a", size=processor.fixed_size)
    with pytest.raises(ValueError, match="pixels only"):
        processor(images=pictures, instruction="a", size=(64, 48))
    with pytest.raises(ValueError, match="max_image_size"):
        processor.target_size(300, 200, max_image_size=64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "draw"}, "'draw'"),
        ({"task": "reconstruct"}, "needs images"),
        ({"task": "generate"}, "needs text"),
        ({"task": "generate", "text": ["a"], "dropped": [True, False]}, "2 entries"),
        ({"task": "caption", "text": ["a"], "dropped": [True]}, "cannot be dropped"),
        ({"task": "generate", "text": ["a", "b"], "images": [Image.new("RGB", (8, 8))]}, "2 and 1"),
    ],
)
def test_arguments_that_do_not_belong_together_are_refused(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


# sampling


@pytest.mark.parametrize("guidance_scale", [0.0, 3.0])
def test_reconstructions_follow_the_image(model, processor, pictures, guidance_scale):
    settings = {"task": "reconstruct", "num_inference_steps": 3, "guidance_scale": guidance_scale}
    same = [torch.Generator().manual_seed(0) for _ in range(2)]
    image, other = model.generate_images(processor, ["Describe it."] * 2, pictures[:2], generator=same, **settings)
    assert image.size == (32, 32) and image.tobytes() != other.tobytes()
    assert len(model.generate_images(processor, images=pictures, **settings)) == 3


def test_inpainting_keeps_what_is_not_masked(model, processor, pictures):
    batch = processor.prompts(["a dog"])
    side = model.config.image_size
    mask = Image.new("L", (side, side), 0)
    mask.paste(255, (0, 0, side // 2, side))
    mask = model.token_mask([mask])
    assert mask.sum() * 2 == mask.numel()
    tokens = model.encode_target(processor.crop(pictures[:1]))
    known = tokens.masked_fill(mask, model.config.mask_token_id)
    noise = model.sampling_noise(1, generators(1))
    steps = list(model.generate_tokens(batch["input_ids"], batch["attention_mask"], noise, 4, 1.75, known=known))
    assert len(steps) == 4 and torch.equal(steps[-1][0][~mask], tokens[~mask])
    unknown = [int((after == model.config.mask_token_id).sum()) for _, after in steps]
    assert unknown == sorted(unknown, reverse=True) and unknown[-1] < unknown[0]
    images = model.generate_images(
        processor, ["a dog"], pictures[:1], task="edit", mask_images=[Image.new("L", (40, 36))], num_inference_steps=2
    )
    kept = to_images(model.decode_target(tokens), rounding="down")[0]
    assert images[0].tobytes() == kept.tobytes(), "nothing was masked"


@pytest.mark.parametrize(
    "arguments",
    [
        {"task": "edit"},
        {"task": "reconstruct"},
        {"task": "draw"},
        {"text": None},
        {"height": 16},
        {"num_inference_steps": 0},
    ],
)
def test_wrong_sampling_arguments_are_refused(model, processor, arguments):
    with pytest.raises(ValueError):
        model.generate_images(processor, **{"text": ["a"], **arguments})


def test_sampled_answers_follow_the_generator(model, processor, pictures):
    def answer(seed):
        generator = torch.Generator().manual_seed(seed)
        options = {"generator": generator, "max_new_tokens": 8, "temperature": 1.0}
        return model.generate_text(processor, ["Why?"], pictures[:1], **options)

    assert answer(0) == answer(0) != answer(1)


# checkpoints


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "published"
    shutil.copytree(PUBLISHED, folder)
    for path in folder.glob("**/*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def test_save_pretrained_is_bit_exact(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.down_scale, processor.max_text_length = 4, 77
    processor.save_pretrained(tmp_path)
    assert same_weights(model, AutoUnifiedModel.from_pretrained(tmp_path))
    again = AutoUnifiedProcessor.from_pretrained(tmp_path)
    settings = ("image_size", "clip_image_size", "max_text_length", "down_scale", "resize_back", "mask_token_id")
    assert [getattr(again, name) for name in settings] == [getattr(processor, name) for name in settings]
    assert torch.equal(again.prompts(["a boat"])["input_ids"], processor.prompts(["a boat"])["input_ids"])


@pytest.mark.parametrize("name", ["show-o", "show-o-w-clip-vit"])
def test_write_published_is_the_inverse_of_read_published(name, tmp_path):
    model = AutoUnifiedModel.from_pretrained(PUBLISHED / name)
    show_o.write_published(model, AutoUnifiedProcessor.from_pretrained(PUBLISHED / name), tmp_path / "new")
    again = AutoUnifiedModel.from_pretrained(tmp_path / "new")
    assert isinstance(again, show_o.Model) and same_weights(model, again)
    assert {**again.config.to_dict(), "_name_or_path": ""} == {**model.config.to_dict(), "_name_or_path": ""}
    processor = AutoUnifiedProcessor.from_pretrained(tmp_path / "new")
    assert processor.mask_token_id == model.config.mask_token_id
    before = load_file(PUBLISHED / "magvitv2/pytorch_model.safetensors")
    after = load_file(tmp_path / "new/magvitv2/pytorch_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    if model.config.w_clip_vit:
        before = load_file(PUBLISHED / name / "pytorch_model.safetensors")
        after = load_file(tmp_path / "new/pytorch_model.safetensors")
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_parts_may_be_anywhere(published, tmp_path):
    reference = AutoUnifiedModel.from_pretrained(published / "show-o-w-clip-vit")
    away = tmp_path / "away"
    away.mkdir()
    names = {"vq_model": "magvitv2", "vision_tower": "clip-vit-large-patch14-336", "llm": "phi-1_5"}
    parts = {argument: shutil.move(published / name, away / argument) for argument, name in names.items()}
    with pytest.raises(CheckpointError, match="`vq_model`"):
        AutoUnifiedModel.from_pretrained(published / "show-o-w-clip-vit")
    model = AutoUnifiedModel.from_pretrained(published / "show-o-w-clip-vit", **parts)
    assert same_weights(model, reference)
    processor = AutoUnifiedProcessor.from_pretrained(published / "show-o-w-clip-vit", **parts)
    assert processor.image_size == reference.config.image_size


def test_a_folder_of_folders_holds_one_show_o(published):
    with pytest.raises(CheckpointError, match="show-o, show-o-w-clip-vit"):
        AutoUnifiedModel.from_pretrained(published)
    shutil.rmtree(published / "show-o")
    assert AutoUnifiedModel.from_pretrained(published).config.w_clip_vit


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("show-o-w-clip-vit", lambda w: w.pop("mm_projector.2.bias"), r"missing \(1\): mm_projector.2.bias"),
        ("show-o-w-clip-vit", lambda w: w.update(extra=torch.zeros(1)), r"unexpected \(1\): extra"),
        (
            "show-o-w-clip-vit",
            lambda w: w.update({"showo.lm_head.bias": torch.zeros(3)}),
            r"wrongly shaped.*lm_head.bias",
        ),
        ("magvitv2", lambda w: w.pop("encoder.mid.attn_1.q.bias"), r"missing \(1\): vq_model"),
        ("magvitv2", lambda w: w.update({"quantize.power_vals": w["quantize.power_vals"].flip(0)}), "power_vals"),
    ],
)
def test_weights_that_do_not_fit_are_refused(published, file, change, message):
    path = published / file / "pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        AutoUnifiedModel.from_pretrained(published / "show-o-w-clip-vit")


def test_truncated_files_are_refused(published):
    for name in ("show-o-w-clip-vit/pytorch_model.safetensors", "show-o/pytorch_model.bin"):
        path = published / name
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match=path.name):
            AutoUnifiedModel.from_pretrained(path.parent)


def test_a_pickle_of_more_than_tensors_is_refused(published):
    torch.save({"weights": {}, "args": shutil.Error("anything")}, published / "show-o" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        AutoUnifiedModel.from_pretrained(published / "show-o")


@pytest.mark.parametrize(("key", "value"), [("codebook_size", 128), ("num_vq_tokens", 15), ("vocab_size", 700)])
def test_contradictory_configurations_are_refused(published, key, value):
    path = published / "show-o" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=r"image tokens|no square|vocab_size"):
        AutoUnifiedModel.from_pretrained(published / "show-o")


def test_another_tokenizer_is_refused(published):
    path = published / "show-o" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **{k: config[k] + 1 for k in ("llm_vocab_size", "vocab_size")}}))
    with pytest.raises(CheckpointError, match="tokenizer"):
        AutoUnifiedProcessor.from_pretrained(published / "show-o")


def test_the_defaults_are_the_published_sizes():
    with torch.device("meta"):
        model = show_o.Model(show_o.Config())

    def count(name):
        return sum(parameter.numel() for parameter in model.get_submodule(name).parameters())

    assert model.config.mask_token_id == 58497 and model.config.image_size == 512
    assert count("language_model") == 1_448_176_770
    assert count("mm_projector") == 6_295_552
    assert (count("vq_model.encoder"), count("vq_model.decoder")) == (55_439_171, 39_947_833)
    assert count("vision_tower") == 303_507_456
