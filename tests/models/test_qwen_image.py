"""Qwen-Image-Edit against diffusers' pipelines on tiny random weights: pictures, sampling and a training step in float32, bit
for bit; what its adapters and checkpoints are elsewhere."""

import copy
import re
import shutil

import datasets
import pytest
import torch
from diffusers import QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2_5_VLProcessor, Qwen2TokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reca_trainer import RecAConfig, RecATrainer
from reca_trainer.adapters import attach
from reca_trainer.models import qwen_image
from reca_trainer.models.auto import AutoUnifiedModel, AutoUnifiedProcessor, detect
from reca_trainer.models.common.condition_dropout import draw_condition_dropout
from reca_trainer.models.qwen_image.processing_qwen_image import TEMPLATES
from reca_trainer.models.weights import CheckpointError
from reca_trainer.saving.export import export
from reca_trainer.saving.hub import uploaded_files
from tests.conftest import GOLDEN

TOKENIZER = Qwen2TokenizerFast.from_pretrained(GOLDEN / "lance" / "checkpoint" / "Lance_3B")
PICTURES = [Image.effect_noise(size, 90).convert("RGB") for size in ((50, 34), (40, 48))]
SIZE = (24, 40)
GUIDANCE = {"guidance_scale": 3.0, "negative_prompt": "blurry, a cat"}


def build(**transformer):
    torch.manual_seed(0)
    config = qwen_image.Config.tiny(len(TOKENIZER))
    image, video = TOKENIZER.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    config.text_encoder_config.image_token_id, config.text_encoder_config.video_token_id = image, video
    config.text_encoder_config.text_config.initializer_range = 0.2  # else a new model looks the same whatever it reads
    config.vae_config |= {
        "latents_mean": [0.1 * i for i in range(8)],
        "latents_std": [1.5 - 0.1 * i for i in range(8)],
    }
    config.transformer_config |= transformer
    processor = qwen_image.Processor(
        TOKENIZER, resolution=32, condition_resolution=32, stride=8, understanding_stride=8
    )
    return qwen_image.Model(config).eval(), processor


@pytest.fixture(scope="module", params=[False, True], ids=["2509", "2511"])
def pair(request):
    return build(zero_cond_t=request.param)


@pytest.fixture(scope="module")
def model():
    return build()[0]


@pytest.fixture(scope="module")
def processor():
    return build()[1]


def pipelines(model):
    """diffusers' pipelines for text-to-image and editing around the parts of a model."""
    parts = {"text_encoder": model.text_encoder, "vae": model.vae, "transformer": model.transformer}
    parts |= {"scheduler": model._scheduler(), "tokenizer": TOKENIZER}
    # As the class makes it where torchvision, which it needs for videos alone, can be imported.
    pictures = Qwen2_5_VLProcessor.__new__(Qwen2_5_VLProcessor)
    pictures.image_processor = Qwen2VLImageProcessorPil(
        patch_size=4, size={"shortest_edge": 64, "longest_edge": 2**20}
    )
    pictures.tokenizer, pictures.video_processor, pictures.chat_template = TOKENIZER, None, None
    pictures.image_token, pictures.video_token = "<|image_pad|>", "<|video_pad|>"
    pictures.image_token_id, pictures.video_token_id = TOKENIZER.convert_tokens_to_ids(
        ["<|image_pad|>", "<|video_pad|>"]
    )
    made = QwenImagePipeline(**parts), QwenImageEditPlusPipeline(**parts, processor=pictures)
    for pipeline, template in zip(made, ("generate", "edit"), strict=True):
        head = pipeline.prompt_template_encode.split("{}")[0]
        assert pipeline.prompt_template_encode == TEMPLATES[template]
        pipeline.prompt_template_encode_start_idx = len(TOKENIZER(head)["input_ids"])  # of the tiny tokenizer
        pipeline.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """diffusers' pipeline for pictures of 32 × 32 pixels."""

    def dimensions(area, ratio):
        height, width = qwen_image.processing_qwen_image.bounded_size(ratio, 1, 32, 8)
        return width, height

    monkeypatch.setattr(edit_plus, "calculate_dimensions", dimensions)


@pytest.fixture
def grid_positions(pair):
    """What diffusers 0.42 leaves out of its call of Qwen2.5-VL, so that transformers 5 takes the tokens of a picture for words
    in a row; transformers 4, with which Qwen-Image-Edit was published, worked it out itself."""
    text_encoder = pair[0].text_encoder
    image = text_encoder.config.image_token_id

    def add(module, args, kwargs):
        if kwargs.get("pixel_values") is not None:
            kwargs["mm_token_type_ids"] = (kwargs["input_ids"] == image).int()
        return args, kwargs

    handle = text_encoder.register_forward_pre_hook(add, with_kwargs=True)
    yield
    handle.remove()


@pytest.fixture
def decoded(pair, monkeypatch):
    """The latents that the autoencoder decodes."""
    latents, decode = [], pair[0].vae.decode
    monkeypatch.setattr(pair[0].vae, "decode", lambda z, **kwargs: (latents.append(z), decode(z, **kwargs))[1])
    return latents


def seed(number=0):
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("options", [{}, GUIDANCE, {"guidance_scale": 4.0}], ids=["plain", "negative", "default"])
def test_text_to_image_is_the_pipelines(pair, decoded, options):
    (model, processor), prompt = pair, "a small cat <|im_end|> on\n a mat"
    steps = {"num_inference_steps": 3, "height": SIZE[0], "width": SIZE[1]}
    (picture,) = model.generate_images(
        processor, prompt, generator=seed(), **steps, **(options or {"guidance_scale": 1.0})
    )
    guidance = {
        "true_cfg_scale": options.get("guidance_scale", 1.0),
        "negative_prompt": options.get("negative_prompt"),
    }
    if options == {"guidance_scale": 4.0}:
        guidance["negative_prompt"] = " "
    result = pipelines(model)[0](prompt, generator=seed(), **steps, **guidance).images[0]
    assert torch.equal(*decoded)
    assert picture.tobytes() == result.tobytes() and picture.size == SIZE[::-1]


@pytest.mark.parametrize("picture", PICTURES, ids=["wide", "high"])
@pytest.mark.parametrize("options", [{}, GUIDANCE], ids=["plain", "negative"])
@pytest.mark.usefixtures("grid_positions")
def test_editing_is_the_pipelines(pair, decoded, picture, options):
    model, processor = pair
    steps = {"num_inference_steps": 3, "height": SIZE[0], "width": SIZE[1]}
    (ours,) = model.generate_images(
        processor,
        "make it red",
        picture,
        task="edit",
        generator=seed(),
        **steps,
        **(options or {"guidance_scale": 1.0}),
    )
    guidance = {
        "true_cfg_scale": options.get("guidance_scale", 1.0),
        "negative_prompt": options.get("negative_prompt"),
    }
    result = pipelines(model)[1](picture, "make it red", generator=seed(), **steps, **guidance).images[0]
    assert torch.equal(*decoded)
    assert ours.tobytes() == result.tobytes()


@pytest.mark.parametrize("size", [(640, 480), (333, 517), (90, 300), (1024, 1024)])
def test_pictures_are_those_of_the_pipeline(size, monkeypatch):
    monkeypatch.undo()  # the published resolutions
    picture = Image.effect_noise(size, 60).convert("RGB")
    processor, vae = qwen_image.Processor(TOKENIZER), VaeImageProcessor(vae_scale_factor=16)
    width, height = edit_plus.calculate_dimensions(edit_plus.VAE_IMAGE_SIZE, size[0] / size[1])
    assert processor.target_size(*size) == (height, width)
    assert torch.equal(processor.to_pixels([picture]), vae.preprocess(picture, height, width))
    width, height = edit_plus.calculate_dimensions(edit_plus.CONDITION_IMAGE_SIZE, size[0] / size[1])
    encoded = Qwen2VLImageProcessorPil()(vae.resize(picture, height, width), return_tensors="pt")
    condition = processor.to_condition(picture)
    patches, grid = qwen_image.modeling_qwen_image.image_patches(
        condition[None], qwen_image.Config().text_encoder_config.vision_config
    )
    assert torch.equal(patches, encoded["pixel_values"]) and torch.equal(grid, encoded["image_grid_thw"])


@pytest.mark.parametrize("task", ["generate", "reconstruct", "edit"])
@pytest.mark.usefixtures("grid_positions")
def test_a_training_step_is_flow_matching_on_the_pipelines_parts(pair, task):
    model, processor = copy.deepcopy(pair[0]), pair[1]
    target, source = PICTURES[0], PICTURES[1].resize((50, 34))
    words = {"instruction" if task == "reconstruct" else "text": ["a small cat"]}
    batch = processor(images=[(source, target) if task == "edit" else target], task=task, **words)
    corruption = model.sample_corruption(batch, [seed()])
    model.freeze_understanding()
    output = model(**batch, corruption=corruption)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.transformer.named_parameters() if p.grad is not None}

    text_to_image, edit = pipelines(pair[0])
    if task == "generate":
        prompt, mask = text_to_image.encode_prompt("a small cat")
    else:
        seen = target if task == "reconstruct" else source
        size = edit_plus.calculate_dimensions(None, seen.width / seen.height)
        prompt, mask = edit.encode_prompt("a small cat", [edit.image_processor.resize(seen, size[1], size[0])])
    width, height = edit_plus.calculate_dimensions(None, target.width / target.height)

    def tokens(picture):
        pixels = edit.image_processor.preprocess(picture, height, width).unsqueeze(2)
        with torch.no_grad():
            latents = edit._encode_vae_image(pixels, None)
        return edit._pack_latents(latents, 1, 8, height // 4, width // 4)

    noise = edit._pack_latents(corruption["noise"], 1, 8, height // 4, width // 4)
    scheduler, logit = pair[0]._scheduler(), corruption["sigmas"].new_tensor(0.0)
    generator = seed()
    torch.randn(8, height // 4, width // 4, generator=generator)
    logit = torch.randn((), generator=generator)
    shift = edit_plus.calculate_shift(noise.shape[1], 256, 8192, 0.5, 0.9)
    sigma = scheduler.time_shift(shift, 1.0, torch.sigmoid(logit))[None]
    clean = tokens(target)
    inputs, shapes = (1 - sigma) * clean + sigma * noise, [(1, height // 8, width // 8)]
    if task == "edit":
        inputs, shapes = torch.cat([inputs, tokens(source)], dim=1), shapes * 2
    transformer = copy.deepcopy(pair[0].transformer).requires_grad_(True)
    prediction = transformer(
        hidden_states=inputs,
        encoder_hidden_states=prompt.detach(),
        encoder_hidden_states_mask=mask,
        timestep=sigma,
        img_shapes=[shapes],
        return_dict=False,
    )[0][:, : noise.shape[1]]
    loss = (prediction - (noise - clean)).square().mean()
    loss.backward()
    assert torch.equal(output.prediction, prediction) and torch.equal(output.target, noise - clean)
    assert torch.equal(output.loss, loss)
    expected = {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


def test_every_trained_weight_gets_a_gradient_and_the_others_cannot(model, processor):
    model = copy.deepcopy(model).requires_grad_(True)
    trained = [f"{name}." for name in model.generation_modules]
    model(**processor(images=PICTURES[:1], instruction="a cat")).loss.backward()
    reached = {name for name, p in model.transformer.named_parameters() if p.grad is not None}
    assert reached == {
        name for name, _ in model.transformer.named_parameters() if f"transformer.{name}".startswith(tuple(trained))
    }


def test_a_reconstruction_has_no_latents_of_its_source(model, processor):
    calls = []
    handle = model.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    for task, images in (("reconstruct", PICTURES[0]), ("edit", (PICTURES[0], PICTURES[0]))):
        words = {"instruction" if task == "reconstruct" else "text": ["a cat"]}
        model(**processor(images=[images], task=task, **words))
    handle.remove()
    assert [len(call["img_shapes"][0]) for call in calls] == [1, 2]
    assert 2 * calls[0]["hidden_states"].shape[1] == calls[1]["hidden_states"].shape[1]


def test_dropped_tokens_of_the_picture_are_not_read(model, processor):
    batch = processor(images=PICTURES[:1], instruction="")
    encoded = model.encode_batch(batch)
    encoded.pop("latents")
    corruption = model.sample_corruption(batch, [seed()]) | draw_condition_dropout(0.4, 1, [seed(1)])
    seen = []
    handle = model.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    losses = [model(**batch, corruption=corruption).loss]
    handle.remove()
    hidden = seen[0]["encoder_hidden_states_mask"][0] == 0
    is_picture = encoded["condition_ids"][0] == model.config.text_encoder_config.image_token_id
    assert hidden.sum() == 6 == is_picture.sum() * 2 // 5 and not hidden[~is_picture].any()
    for changed in (hidden, ~hidden):
        embeds = encoded["condition_embeds"].masked_fill(changed[None, :, None], 7.0)
        words = processor(instruction=[""], task="reconstruct")
        batch = {**words, "pixel_values": batch["pixel_values"], **encoded, "condition_embeds": embeds}
        losses.append(model(**batch, corruption=corruption).loss)
    assert torch.equal(losses[0], losses[1]) and abs(losses[0] - losses[2]) > 1e-3


def test_cached_states_give_the_same_loss_and_refuse_an_instruction(model, processor):
    batch = processor(images=PICTURES, instruction="", size=SIZE)
    corruption = model.sample_corruption(batch, [seed(0), seed(1)])
    encoded = model.encode_batch(batch)
    plain = model(**batch, corruption=corruption).loss
    for instruction, dropped in (("", None), ("a cat", [True, True])):
        words = processor(instruction=[instruction] * 2, task="reconstruct", dropped=dropped)
        assert torch.equal(model(**{**words, **encoded}, corruption=corruption).loss, plain)
        assert model.count_supervised({**words, **encoded}, corruption) == model.count_supervised(batch, corruption)
    words = processor(instruction=["", "a cat"], task="reconstruct")
    with pytest.raises(ValueError, match="set instruction_dropout=1, or leave cache_latents off"):
        model(**{**words, **encoded}, corruption=corruption)


def test_published_sizes():
    with torch.device("meta"):
        model = qwen_image.Model(qwen_image.Config())
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert sizes == {"text_encoder": 8_292_166_656, "transformer": 20_430_401_088, "vae": 126_892_531}
    assert model.config.understanding_stride == 28


@pytest.fixture(scope="module")
def published(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "model"
    export(model, folder, processor=processor, max_shard_size="300KB")
    return folder


def test_the_published_layout_in_and_out(model, processor, published, tmp_path):
    assert detect(published) == (qwen_image, True)
    loaded, again = AutoUnifiedModel.from_pretrained(published), AutoUnifiedProcessor.from_pretrained(published)
    for part in ("transformer", "vae", "scheduler"):
        ours = getattr(model.config, f"{part}_config")
        assert {**getattr(loaded.config, f"{part}_config"), **ours} == getattr(loaded.config, f"{part}_config")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    export(published, tmp_path / "again", max_shard_size="300KB")
    files = [path for path in published.rglob("*") if path.is_file() and path.name != "tokenizer_config.json"]
    assert len(files) > 12
    for path in files:  # but for settings that a tokenizer takes on in use
        assert (tmp_path / "again" / path.relative_to(published)).read_bytes() == path.read_bytes(), path
    again = again.with_arguments(resolution=32, condition_resolution=32, stride=8)
    batch = processor(images=PICTURES[:1], instruction="a cat")
    corruption = model.sample_corruption(batch, [seed()])
    loss = loaded(**again(images=PICTURES[:1], instruction="a cat"), corruption=corruption).loss
    torch.testing.assert_close(loss, model(**batch, corruption=corruption).loss, rtol=1e-5, atol=1e-6)


def test_diffusers_loads_the_published_layout(model, published):
    pipeline = QwenImageEditPlusPipeline.from_pretrained(published, processor=pipelines(model)[1].processor)
    for name in ("text_encoder", "transformer", "vae"):
        weights = getattr(model, name).state_dict()
        assert weights.keys() == getattr(pipeline, name).state_dict().keys()
        assert all(torch.equal(weights[key], tensor) for key, tensor in getattr(pipeline, name).state_dict().items())
    assert pipeline.tokenizer("a cat")["input_ids"] == TOKENIZER("a cat")["input_ids"]
    assert dict(pipeline.scheduler.config).items() >= model.config.scheduler_config.items()


def test_all_of_the_published_layout_goes_to_the_hub(published):
    assert uploaded_files(published)[1] == []


def test_other_pipelines_are_refused_by_name(published, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(published, folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("QwenImageEditPlusPipeline", "QwenImageEditPipeline"))
    with pytest.raises(CheckpointError, match="a checkpoint of QwenImageEditPipeline"):
        AutoUnifiedModel.from_pretrained(folder)


# Keys that ComfyUI takes for Qwen-Image: `transformer.`, a linear layer of its transformer, `lora_A` and `lora_B`
# (model_lora_keys_unet in comfy/lora.py, comfy/ldm/qwen_image/model.py at 01f4512, comfy/weight_adapter/lora.py at 0323d87).
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LAYERS = [
    *(f"attn.{name}" for name in ATTENTION),
    *(f"{s}_mlp.net.{n}" for s in ("img", "txt") for n in ("0.proj", "2")),
]
COMFYUI = rf"transformer\.transformer_blocks\.\d+\.({'|'.join(map(re.escape, LAYERS))})\.lora_[AB]\.weight"
KINDS = {
    "plain": {"r": 2, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 2, "rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_q": 12, "txt_mlp.net.2": 1}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_loads_in_diffusers(kind, model, published, tmp_path):
    adapted = attach(copy.deepcopy(model), LoraConfig(init_lora_weights=False, **KINDS[kind])).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(published)
    adapted.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "lora")
    ((name, file),) = uploaded_files(tmp_path / "lora")[0].items()
    assert name == "pytorch_lora_weights.safetensors"
    keys = load_file(file).keys()
    assert all(re.fullmatch(COMFYUI, key) for key in keys)
    assert {re.fullmatch(COMFYUI, key)[1] for key in keys} == set(LAYERS)  # every kind of layer
    pipeline = pipelines(copy.deepcopy(model))[0]
    weights = {"weight_name": "pytorch_lora_weights.safetensors"}  # which older diffusers ask for without a network
    pipeline.load_lora_weights(tmp_path / "lora", **weights)
    inputs = {
        "hidden_states": torch.randn(1, 15, 32, generator=seed()),
        "encoder_hidden_states": torch.randn(1, 9, 64, generator=seed(1)),
        "timestep": torch.tensor([0.3]),
        "img_shapes": [[(1, 3, 5)]],
        "return_dict": False,
    }
    with torch.no_grad():
        theirs, ours = pipeline.transformer(**inputs)[0], adapted.get_base_model().transformer(**inputs)[0]
        plain = model.transformer(**inputs)[0]
    assert (plain - ours).abs().max() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_adapters_that_only_merge_are_refused(model, published, tmp_path):
    adapted = attach(copy.deepcopy(model), LoraConfig(r=2, use_dora=True))
    adapted.peft_config["default"].base_model_name_or_path = str(published)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="no plain LoRA, which is all that diffusers and ComfyUI load"):
        export(tmp_path / "adapter", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_source_that_is_to_be_dropped_is_refused(processor):
    pictures = [(PICTURES[0], PICTURES[0])]
    with pytest.raises(ValueError, match="set edit_source_dropout=0"):
        processor(images=pictures, text=["a cat"], task="edit", dropped_sources=[(True, False)])


def test_a_run_drops_tokens_of_the_picture_unless_told_otherwise(model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pictures = datasets.Dataset.from_dict({"image": PICTURES})
    for given, expected in ((None, 0.85), (0.0, 0.0)):
        args = RecAConfig(
            output_dir=str(tmp_path / str(given)),
            condition_token_dropout=given,
            instruction_dropout=1.0,
            cache_latents=True,
            max_steps=1,
            per_device_train_batch_size=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        run = RecATrainer(copy.deepcopy(model), args, train_dataset=pictures, processing_class=processor)
        assert run.args.condition_token_dropout == expected
        masks, asked = [], []
        run.model.transformer.register_forward_pre_hook(
            lambda _, args, kwargs, masks=masks: masks.append(kwargs["encoder_hidden_states_mask"]), with_kwargs=True
        )
        run.model.text_encoder.model.register_forward_pre_hook(lambda *_, asked=asked: asked.append(1))
        run.train()
        assert len(masks) == 1 and (masks[0] is None) == (expected == 0)
        assert len(asked) == (len(PICTURES) if given is None else 0)  # the other run finds the states on disk
