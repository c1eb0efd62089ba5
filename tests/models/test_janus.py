"""Janus against plain transformers: same weights, same generation, and losses recomputed token by token."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast

from reca_trainer.adapters import attach
from reca_trainer.models import janus
from reca_trainer.models.auto import AutoUnifiedModel, AutoUnifiedProcessor
from reca_trainer.saving.merge import merge_adapter

INSTRUCTION = "Say what the picture shows."


def build(**overrides):
    torch.manual_seed(0)
    config = janus.Config.tiny(image_size=16)
    for name, value in overrides.items():
        setattr(config, name, value)
    model = janus.Model(config).eval()
    with torch.no_grad():  # codes of very different lengths, and predictions far from uniform
        model.model.vqmodel.quantize.embedding.weight.mul_(torch.linspace(0.1, 10, 512)[:, None])
        model.model.generation_head.vision_head.weight.mul_(20)
        model.lm_head.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def processor():
    return janus.Processor.tiny(janus.Config.tiny(image_size=16))


@pytest.fixture
def model():
    return build()


@pytest.fixture
def plain(model):
    """The same weights in transformers' own class."""
    twin = transformers.JanusForConditionalGeneration(model.config).eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin


def pictures(*sizes):
    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 255, (4, 4, 3), dtype=np.uint8) for _ in sizes]
    return [Image.fromarray(noise).resize(size) for noise, size in zip(coarse, sizes, strict=True)]


# The reference: one sample, one token, one full forward pass at a time, through transformers' modules.


def naive_image_tokens(plain, pixels):
    """The code whose direction is closest to each latent, row by row. `pixels` is `[3, H, W]`."""
    vq = plain.model.vqmodel
    latents = vq.quant_conv(vq.encoder(pixels[None]))[0]
    codes = vq.quantize.embedding.weight
    codes = codes / codes.norm(dim=1, keepdim=True)
    tokens = []
    for row in range(latents.shape[1]):
        for column in range(latents.shape[2]):
            latent = latents[:, row, column] / latents[:, row, column].norm()
            tokens.append(int((codes - latent).square().sum(1).argmin()))
    return tokens


def naive_prompt(plain, ids, condition=None):
    """Input embeddings of one sample, a list of `[D]`."""
    embed = plain.get_input_embeddings().weight
    features = []
    if condition is not None:
        features = list(plain.model.aligner(plain.model.vision_model(condition[None]).last_hidden_state)[0])
    return [features.pop(0) if i == plain.config.image_token_id else embed[i] for i in ids]


def naive_next(plain, sequence, head):
    """Next-token logits after a list of embeddings."""
    return head(plain.model.language_model(inputs_embeds=torch.stack(sequence)[None]).last_hidden_state[0, -1])


def naive_image_embed(plain, token):
    return plain.model.generation_aligner(plain.model.generation_embeddings.weight[token])


def naive_image_loss(plain, ids, pixels, condition=None):
    sequence, total = naive_prompt(plain, ids, condition), 0.0
    tokens = naive_image_tokens(plain, pixels)
    for token in tokens:
        total -= naive_next(plain, sequence, plain.model.generation_head).log_softmax(-1)[token]
        sequence.append(naive_image_embed(plain, token))
    return total / len(tokens)


def naive_generate(plain, prompt, blank=None, scale=1.0, uniform=None):
    """Image tokens of one sample, guided by the prompt `blank` if given, drawn with `uniform` or the likeliest."""
    tokens = []
    for step in range(plain.config.vision_config.num_image_tokens):
        logits = naive_next(plain, prompt, plain.model.generation_head)
        if blank is not None:
            without = naive_next(plain, blank, plain.model.generation_head)
            logits = without + scale * (logits - without)
        if uniform is None:
            token = int(logits.argmax())
        else:
            token, mass = -1, 0.0
            probabilities = logits.double().softmax(-1).tolist()
            while mass < uniform[step]:
                token += 1
                mass += probabilities[token]
        tokens.append(token)
        for sequence in [prompt] if blank is None else [prompt, blank]:
            sequence.append(naive_image_embed(plain, token))
    return tokens


def decode(plain, tokens):
    pixels = plain.model.vqmodel.decode(torch.tensor([tokens]))[0].clamp(-1, 1)
    return ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def assert_same_picture(image, expected):
    """Up to one grey level, which the rounding of a batched convolution may cost; another image token costs dozens."""
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 1, f"pixels differ by up to {difference.max()}"


def unpadded(row, mask):
    return [i for i, seen in zip(row.tolist(), mask.tolist(), strict=True) if seen]


# Losses


@torch.no_grad()
def test_image_tokens_are_the_nearest_unit_codes(model, plain, processor):
    pixels = processor(images=pictures((16, 16), (50, 40)))["pixel_values"]
    tokens = model.encode_target(pixels)
    assert tokens.tolist() == [naive_image_tokens(plain, image) for image in pixels]
    assert len(set(tokens.flatten().tolist())) > 5
    # no other choice of code lies closer to the latents in what the decoder is given
    vq = model.model.vqmodel
    latents = F.normalize(vq.quant_conv(vq.encoder(pixels)), dim=1)
    error = (vq.quantize.get_codebook_entry(tokens) - latents).square().sum(1)
    raw = vq.encode(pixels, return_dict=True).image_tokens.view(tokens.shape)
    assert (error <= (vq.quantize.get_codebook_entry(raw) - latents).square().sum(1) + 1e-6).all()


def test_published_dimensions_give_576_tokens():
    with torch.device("meta"):
        model = janus.Model(janus.Config())
        images = torch.zeros(2, 3, 384, 384)
        assert model.model.vqmodel.encoder(images).shape[-2:] == (24, 24)
        assert model.encode_condition(images).shape == (2, 576, 2048)
        assert model.count_supervised({"pixel_values": images}, {}) == 2 * 576


@torch.no_grad()
@pytest.mark.parametrize("instruction", [INSTRUCTION, ""])
def test_reconstruction_loss_is_the_naive_one(model, plain, processor, instruction):
    batch = processor(images=pictures((16, 16), (50, 40)), instruction=instruction, task="reconstruct")
    output = model(**batch)
    losses = torch.stack(
        [
            naive_image_loss(plain, ids.tolist(), pixels, condition)
            for ids, pixels, condition in zip(
                batch["input_ids"], batch["pixel_values"], batch["condition_pixel_values"], strict=True
            )
        ]
    )
    torch.testing.assert_close(output.per_sample_loss, losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, losses.mean(), rtol=1e-5, atol=1e-5)
    assert output.understanding_embeds.shape == (2, 16, 128)
    assert output.prediction.shape == (2, 16, 512) and output.target.shape == (2, 16)


@torch.no_grad()
@pytest.mark.parametrize("task", ["reconstruct", "generate"])
def test_texts_of_different_length_and_dropped_ones_have_the_naive_losses(model, plain, processor, task):
    columns = {
        "images": pictures((16, 16), (50, 40), (40, 50), (20, 20)),
        "instruction" if task == "reconstruct" else "text": ["red", "a long blue thing", "a box", "what is here?"],
        "dropped": [False, False, True, True],
        "crop": [None, 0.9, 0.0, None],
    }
    batch, kept = processor(**columns, task=task), processor(**{**columns, "dropped": None}, task=task)
    tokenizer = processor.tokenizer
    assert len(set(batch["attention_mask"].sum(1).tolist())) == 4
    assert torch.equal(batch["input_ids"][:2], kept["input_ids"][:2])
    losses = model(**batch).per_sample_loss
    for row, drop in enumerate(columns["dropped"]):
        ids = unpadded(kept["input_ids"][row], kept["attention_mask"][row])
        condition = kept["condition_pixel_values"][row] if task == "reconstruct" else None
        if drop:  # what guidance subtracts when sampling: no text, no image
            ids = [tokenizer.bos_token_id, *[tokenizer.pad_token_id] * (len(ids) - 2), tokenizer.boi_token_id]
            condition = None
        assert unpadded(batch["input_ids"][row], batch["attention_mask"][row]) == ids
        expected = naive_image_loss(plain, ids, kept["pixel_values"][row], condition)
        torch.testing.assert_close(losses[row], expected, rtol=1e-5, atol=1e-5)
        alone = processor(**{name: values[row : row + 1] for name, values in columns.items()}, task=task)
        assert (alone["attention_mask"] == 1).all()
        torch.testing.assert_close(losses[row], model(**alone).loss, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_generate_loss_is_the_naive_one_for_prompts_of_different_length(model, plain, processor):
    batch = processor(images=pictures((16, 16), (16, 16)), text=["red", "a long blue thing"], task="generate")
    losses = torch.stack(
        [
            naive_image_loss(plain, unpadded(ids, mask), pixels)
            for ids, mask, pixels in zip(
                batch["input_ids"], batch["attention_mask"], batch["pixel_values"], strict=True
            )
        ]
    )
    output = model(**batch)
    torch.testing.assert_close(output.per_sample_loss, losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, losses.mean(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_caption_loss_is_the_naive_one(model, plain, processor):
    captions = ["red", "a long blue thing"]
    batch = processor(
        images=pictures((16, 16), (50, 40)),
        text=captions,
        instruction=["What is it?", "And this one?"],
        task="caption",
    )
    losses, counts = [], []
    for row, (ids, mask, labels) in enumerate(
        zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ):
        sequence = unpadded(ids, mask)
        answer = [i for i in labels.tolist() if i != -100]
        assert processor.tokenizer.decode(answer) == f" {captions[row]}{processor.tokenizer.eos_token}"
        assert sequence[-len(answer) :] == answer
        embeds = naive_prompt(plain, sequence, batch["condition_pixel_values"][row])
        total = 0.0
        for n, token in enumerate(answer):
            before = embeds[: len(sequence) - len(answer) + n]
            total -= naive_next(plain, before, plain.lm_head).log_softmax(-1)[token]
        losses.append(total / len(answer))
        counts.append(len(answer))
    output = model(**batch)
    torch.testing.assert_close(output.per_sample_loss, torch.stack(losses), rtol=1e-5, atol=1e-5)
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True))
    torch.testing.assert_close(output.loss, total / sum(counts), rtol=1e-5, atol=1e-5)


def test_count_supervised_is_the_number_of_targets(model, processor):
    images, text = pictures((16, 16), (16, 16)), ["red", "a long blue thing"]
    for task in ("reconstruct", "generate", "caption"):
        batch = processor(images=images, text=None if task == "reconstruct" else text, task=task)
        corruption = model.sample_corruption(batch, torch.Generator())
        assert corruption == {}
        assert model.count_supervised(batch, corruption) == model(**batch, corruption=corruption).target.numel()


# Generation


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guided_generation_is_the_naive_one(model, plain, processor, temperature):
    text, seeds = ["red", "a long blue thing"], [3, 4]
    generated = model.generate_images(
        processor,
        text,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        guidance_scale=3.0,
        temperature=temperature,
    )
    inputs = processor.prompts(text, generation_mode="image")
    tokenizer = processor.tokenizer
    for row, image in enumerate(generated):
        ids = unpadded(inputs["input_ids"][row], inputs["attention_mask"][row])
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.boi_token_id
        blank = [ids[0], *[tokenizer.pad_token_id] * (len(ids) - 2), ids[-1]]
        uniform = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(seeds[row])).tolist()
        tokens = naive_generate(
            plain, naive_prompt(plain, ids), naive_prompt(plain, blank), 3.0, uniform if temperature else None
        )
        assert_same_picture(image, decode(plain, tokens))


@torch.no_grad()
def test_reconstruction_from_embeddings_is_the_naive_one(model, plain, processor):
    images = pictures((16, 16), (50, 40))
    generated = model.generate_images(
        processor, [INSTRUCTION] * 2, images, task="reconstruct", guidance_scale=2.0, temperature=0.0
    )
    batch = processor(images=images, instruction=INSTRUCTION)
    for ids, condition, image in zip(
        batch["input_ids"].tolist(), batch["condition_pixel_values"], generated, strict=True
    ):
        blank = [ids[0], *[processor.tokenizer.pad_token_id] * (len(ids) - 2), ids[-1]]
        tokens = naive_generate(plain, naive_prompt(plain, ids, condition), naive_prompt(plain, blank), 2.0)
        assert_same_picture(image, decode(plain, tokens))


def test_text_generation_is_that_of_transformers(model, plain, processor):
    images, questions = pictures((16, 16), (50, 40)), ["What is it?", "How many red things?"]
    inputs = processor.prompts(questions, images)
    ids = plain.generate(**inputs, do_sample=False, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :]
    answers = model.generate_text(processor, questions, images, max_new_tokens=12)
    assert answers == [answer.strip() for answer in processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    torch.testing.assert_close(model.generate(**inputs, do_sample=False, max_new_tokens=12)[:, -ids.shape[1] :], ids)

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate_text(processor, questions, generator=generator, temperature=1.0, max_new_tokens=12)

    assert sample(1) == sample(1) != sample(2)


def test_generation_leaves_the_training_mode(model, processor):
    model.train()
    model.generate_images(processor, ["red"])
    model.generate_text(processor, ["red"], max_new_tokens=2)
    with pytest.raises(ValueError, match="height=64"):
        model.generate_images(processor, ["red"], height=64)
    assert model.training and model.model.language_model.training
    assert not model.model.vision_model.training and not model.model.vqmodel.training


def test_generation_refuses_what_the_model_cannot_do(model, processor):
    with pytest.raises(ValueError, match=r"height=64, but Janus.* always has height=16"):
        model.generate_images(processor, ["red"], height=64)
    with pytest.raises(ValueError, match="num_inference_steps=16"):
        model.generate_images(processor, ["red"], num_inference_steps=50)
    with pytest.raises(ValueError, match="task='edit'"):
        model.generate_images(processor, ["red"], pictures((16, 16)), task="edit")


def test_what_it_learned_to_reconstruct_it_generates(model, processor):
    images = pictures((16, 16), (16, 16))
    batch = processor(images=images, instruction="Again.")
    model.freeze_understanding()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(120):
        output = model.train()(**batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert output.loss < 0.1
    generated = model.generate_images(
        processor, ["Again."] * 2, images, task="reconstruct", guidance_scale=1.0, temperature=0.0
    )
    for image, tokens in zip(generated, model.encode_target(batch["pixel_values"]).tolist(), strict=True):
        assert_same_picture(image, decode(model, tokens))


# Checkpoints


@pytest.mark.parametrize("tied", [False, True])
def test_loads_what_plain_transformers_saves(tmp_path, processor, tied):
    plain = transformers.JanusForConditionalGeneration(build(tie_word_embeddings=tied).config)
    plain.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for model in (AutoUnifiedModel.from_pretrained(tmp_path), janus.Model.from_pretrained(tmp_path)):
        assert type(model) is janus.Model
        state = plain.state_dict()
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert type(AutoUnifiedProcessor.from_pretrained(tmp_path)) is janus.Processor


def test_a_config_that_says_tied_does_not_overwrite_a_head_of_its_own(tmp_path, model, processor):
    """transformers' `JanusConfig` ties by default, Janus' language head was trained apart from the embeddings."""
    model.config.tie_word_embeddings = True
    janus.write_published(model, processor, tmp_path)
    for again in (
        AutoUnifiedModel.from_pretrained(tmp_path),
        transformers.JanusForConditionalGeneration.from_pretrained(tmp_path),
    ):
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
        assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("tied", [False, True])
def test_plain_transformers_loads_and_generates_the_same_from_what_we_save(tmp_path, processor, tied):
    model = build(tie_word_embeddings=tied)
    janus.write_published(model, processor, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "janus" and config["architectures"] == ["JanusForConditionalGeneration"]
    plain = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    plain_processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(plain) is transformers.JanusForConditionalGeneration
    assert type(plain_processor) is transformers.JanusProcessor

    def chat(*content):
        turn = [{"role": "user", "content": list(content)}]
        return plain_processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)

    prompt = chat({"type": "text", "text": "a red circle"})
    inputs = plain_processor(text=prompt, generation_mode="image", return_tensors="pt")
    tokens = plain.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=4.0)
    image = model.generate_images(processor, ["a red circle"], guidance_scale=4.0, temperature=0.0)[0]
    assert_same_picture(image, decode(plain, tokens[0].tolist()))

    picture = pictures((50, 40))[0]
    inputs = plain_processor(
        text=chat({"type": "image"}, {"type": "text", "text": "Why?"}), images=[picture], return_tensors="pt"
    )
    ids = plain.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    answer = model.generate_text(processor, ["Why?"], [picture], max_new_tokens=8)[0]
    assert answer == plain_processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_reload_keeps_weights_batches_and_generation_settings(tmp_path, model, processor):
    janus.write_published(model, processor, tmp_path)
    again, same = AutoUnifiedModel.from_pretrained(tmp_path), AutoUnifiedProcessor.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert again.generation_config.generation_kwargs == {"boi_token_id": processor.tokenizer.boi_token_id}
    images = pictures((16, 16), (50, 40))
    before, after = (each(images=images, instruction=INSTRUCTION) for each in (processor, same))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "task")


def test_an_adapter_merges_into_every_form(tmp_path, model, processor):
    model.save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    trained = AutoUnifiedModel.from_pretrained(tmp_path / "source", quantization_config=quantization)
    trained = attach(trained, LoraConfig(r=4, init_lora_weights=False))
    trained.save_pretrained(tmp_path / "adapter")
    batch = processor(images=pictures((16, 16)), instruction=INSTRUCTION, task="reconstruct")
    with torch.no_grad():
        expected, merged = trained.eval()(**batch).prediction, {}
        for into in ("base", "dequantized", "quantized"):
            merge_adapter(None, tmp_path / "adapter", tmp_path / into, into, torch.float32)
            merged[into] = AutoUnifiedModel.from_pretrained(tmp_path / into).eval()(**batch).prediction
    torch.testing.assert_close(merged["dequantized"], expected, rtol=1e-4, atol=1e-4)
    difference = {into: float((velocity - expected).norm() / expected.norm()) for into, velocity in merged.items()}
    assert 1e-3 < difference["base"] < 1 and 1e-3 < difference["quantized"] < 1
    assert load_file(tmp_path / "quantized" / "model.safetensors").keys() > model.state_dict().keys()


# Training


def every_task(processor):
    images, text = pictures((16, 16), (50, 40)), ["red", "a long blue thing"]
    yield processor(images=images, instruction=INSTRUCTION, task="reconstruct")
    yield processor(images=images, text=text, task="generate")
    yield processor(images=images, text=text, instruction="What is it?", task="caption")


def test_reca_trains_the_generator_and_leaves_what_only_understands(model, processor):
    model.freeze_understanding()
    for batch in every_task(processor):
        model(**batch).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    prefixes = ("model.language_model.", "model.generation_", "lm_head.")
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    assert not any(p.requires_grad for name, p in model.named_parameters() if not name.startswith(prefixes))


def test_lora_touches_only_the_language_model(tmp_path, model, processor):
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    hit = {name for name, _ in model.named_modules() if re.fullmatch(model.lora_target_modules, name)}
    assert hit == {name for name in linear if name.startswith("model.language_model.")}

    config = LoraConfig(target_modules=model.lora_target_modules, r=4, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    batches = list(every_task(processor))
    for batch in batches:
        adapted(**batch).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert len(trained) == 2 * len(hit)

    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path)
    merged = PeftModel.from_pretrained(build(), tmp_path).merge_and_unload()
    with torch.no_grad():
        for batch in batches:
            loss = adapted(**batch).loss
            assert torch.equal(again(**batch).loss, loss)
            torch.testing.assert_close(merged(**batch).loss, loss, rtol=1e-4, atol=1e-5)


def test_heads_and_aligners_train_beside_lora_when_named(tmp_path, model, processor):
    full = ["generation_head", "generation_aligner", "model.aligner"]
    config = LoraConfig(target_modules=model.lora_target_modules, modules_to_save=full, r=4)
    adapted = get_peft_model(model, config)
    adapted(**next(every_task(processor))).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None and "lora_" not in name}
    assert {re.sub(r"base_model\.model\.(.*)\.modules_to_save\..*", r"\1", name) for name in trained} == {
        "model.generation_head",
        "model.generation_aligner",
        "model.aligner",
    }
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(any(name in key for key in saved) for name in full)


@torch.no_grad()
def test_bfloat16_weights_give_nearly_the_same_losses(model, processor):
    half = build().to(torch.bfloat16)
    half.model.vqmodel.float()  # other image tokens would be other targets
    for batch in every_task(processor):
        output = half(**batch)
        assert output.loss.dtype == output.per_sample_loss.dtype == torch.float32
        torch.testing.assert_close(output.loss, model(**batch).loss, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_mixed_precision_trains_on_the_same_image_tokens(model, processor):
    batch = processor(images=pictures((16, 16), (50, 40)), instruction=INSTRUCTION)
    expected = model(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    assert output.prediction.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    assert torch.equal(output.target, expected.target)
    torch.testing.assert_close(output.loss, expected.loss, rtol=2e-2, atol=2e-2)


# Batches


def test_condition_and_target_show_the_same_square(processor):
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste("white", (24, 0, 72, 32))  # resizing may look a few pixels past the crop
    batch = processor(images=[wide])
    torch.testing.assert_close(batch["pixel_values"], torch.ones(1, 3, 16, 16))
    torch.testing.assert_close(batch["condition_pixel_values"], batch["pixel_values"])
    captioned = processor(images=[wide], text=["a bar"], task="caption")["condition_pixel_values"]
    assert captioned.min() < -0.9  # a caption is about the whole image


def test_a_tiny_janus_takes_any_tokenizer():
    words = Tokenizer(
        WordLevel({"[unk]": 0, "red": 1, "circle": 2, "question": 3, "answer": 4, ":": 5}, unk_token="[unk]")
    )
    words.pre_tokenizer = Whitespace()
    config = janus.Config.tiny(vocab_size=6 + 6, image_size=16)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    processor = janus.Processor.tiny(config, tokenizer)
    batch = processor(images=pictures((16, 16)), text=["red circle"], instruction="what ?", task="caption")
    assert batch["labels"][0, -3:].tolist() == [1, 2, config.text_config.eos_token_id]
    assert batch["input_ids"][0, 0] == config.text_config.bos_token_id
    assert (batch["input_ids"] == config.image_token_id).sum() == 16
    assert len(tokenizer) == 6  # untouched
    with pytest.raises(ValueError, match=r"12 entries.*262"):
        janus.Processor.tiny(janus.Config.tiny(), tokenizer)


def test_a_caption_follows_the_prompt_that_inference_sees(processor):
    images = pictures((16, 16), (50, 40))
    batch = processor(images=images, text=["red", "blue and red"], instruction="What is it?", task="caption")
    prompts = processor.prompts(["What is it?"] * 2, images)
    length = prompts["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], prompts["input_ids"])
    assert torch.equal(batch["condition_pixel_values"], prompts["pixel_values"])
    assert (batch["labels"][:, :length] == -100).all() and (batch["labels"][:, length] != -100).all()


def turns(*contents):
    return [
        {"role": "assistant" if number % 2 else "user", "content": content} for number, content in enumerate(contents)
    ]


JANUS_PRO_TEMPLATE = (  # words the turns as Janus-Pro's own does
    "{% set seps = ['\n\n', eos_token] %}{% for message in messages %}"
    "{{ '<|User|>: ' if message.role == 'user' else '<|Assistant|>: ' }}"
    "{% for part in message.content %}{{ '<image_placeholder>\n' if part.type == 'image' else part.text }}{% endfor %}"
    "{% if not loop.last or add_generation_prompt %}{{ seps[0] if message.role == 'user' else seps[1] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)


@torch.no_grad()
@pytest.mark.parametrize(
    ("template", "user", "assistant"),
    [(None, "\nquestion : ", "\nanswer :"), (JANUS_PRO_TEMPLATE, "<|User|>: ", "\n\n<|Assistant|>:")],
    ids=["tiny", "janus-pro"],
)
def test_every_turn_of_a_conversation_is_learned(model, plain, template, user, assistant):
    processor = janus.Processor.tiny(janus.Config.tiny(image_size=16))
    processor.chat_template = template or processor.chat_template
    conversation = turns("What is this?", "A boat.", "And\n<image>", " Lanterns. ", "How many?", "Three.")
    batch = processor(images=pictures((16, 16), (50, 40)), text=[conversation, turns("Why?", "So.")], task="caption")
    ids, labels = unpadded(batch["input_ids"][0], batch["attention_mask"][0]), batch["labels"][0]
    eos = processor.tokenizer.eos_token
    image = f"{processor.image_start_token}{processor.image_token * 16}{processor.image_end_token}\n"
    expected = (
        f"{user.lstrip()}{image}What is this?{assistant} A boat.{eos}"
        f"{user}And{assistant} Lanterns.{eos}{user}How many?{assistant} Three.{eos}"
    )
    assert processor.tokenizer.decode(ids) == processor.tokenizer.bos_token + expected
    assert processor.tokenizer.decode(labels[labels != -100]) == f" A boat.{eos} Lanterns.{eos} Three.{eos}"
    assert torch.equal(labels[labels != -100], batch["input_ids"][0][labels != -100])

    embeds, total, places = naive_prompt(plain, ids, batch["condition_pixel_values"][0]), 0.0, []
    for place, label in enumerate(labels.tolist()):
        if label != -100:
            total -= naive_next(plain, embeds[:place], plain.lm_head).log_softmax(-1)[label]
            places.append(place)
    torch.testing.assert_close(model(**batch).per_sample_loss[0], total / len(places), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("conversation", "problem"),
    [
        (turns("<image>Why?", "So."), None),
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
            processor(images=pictures((16, 16)), text=[conversation], task="caption")


@pytest.mark.parametrize(("place", "left"), [(None, 10), (0.0, 0), (0.99, 20)])
def test_a_target_is_a_square_of_the_longer_side(processor, place, left):
    image = Image.new("RGB", (70, 50), "black")
    image.paste("white", (left, 0, left + 50, 50))
    for picture in (image, image.transpose(Image.Transpose.TRANSPOSE)):
        batch = processor(images=[picture], crop=[place])
        assert batch["pixel_values"].shape == (1, 3, *processor.fixed_size)
        assert (batch["pixel_values"] == 1).all() and (batch["condition_pixel_values"] == 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "edit"}, "task is 'edit'"),
        ({"task": "reconstruct"}, "'reconstruct' needs images"),
        ({"task": "generate"}, "'generate' needs text"),
        ({"task": "caption", "images": pictures((16, 16))}, "'caption' needs text"),
        ({"task": "caption", "images": pictures((16, 16)), "text": ["a", "b"]}, "1 images and 2 texts"),
        ({"images": pictures((16, 16)), "size": (64, 64)}, r"size=\(64, 64\)"),
        ({"images": pictures((16, 16)), "instruction": ["a", "b"]}, "2 entries for a batch of 1"),
        ({"images": pictures((16, 16)), "crop": []}, "0 entries for a batch of 1"),
        ({"task": "generate", "text": ["a"], "dropped": [True, False]}, "2 entries for a batch of 1"),
        ({"task": "caption", "images": pictures((16, 16)), "text": ["a"], "dropped": [True]}, "cannot be dropped"),
    ],
)
def test_the_processor_says_what_is_wrong(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_images_of_another_size_are_refused(model, processor):
    batch = processor(images=pictures((16, 16)))
    batch["pixel_values"] = torch.zeros(1, 3, 32, 16)
    with pytest.raises(ValueError, match="give 8x4 image tokens"):
        model(**batch)
