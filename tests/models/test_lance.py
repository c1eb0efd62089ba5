"""Lance beyond the reference cases: layouts, sizes, batches of unlike rows, guidance."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor
from reca_trainer.models.lance import Model, read_published, write_published
from reca_trainer.models.lance.conversion_lance import table_size
from reca_trainer.models.lance.modeling_lance import LatentPositions, image_place
from reca_trainer.models.weights import CheckpointError, open_weights
from reca_trainer.saving.card import folder_card
from tests.conftest import GOLDEN

CHECKPOINT = GOLDEN / "lance" / "checkpoint"
RESOLUTIONS = {"reconstruct": 64, "edit": 64, "caption": 96, "answer": 96}
ANSWERS = ["a red kite", "two boats near an old stone bridge", "a lamp"]


@pytest.fixture(scope="module")
def model():
    return AutoUnifiedModel.from_pretrained(CHECKPOINT).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoUnifiedProcessor.from_pretrained(CHECKPOINT, resolution=64, understanding_resolutions=RESOLUTIONS)


def pictures(*sizes):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def settings(model):
    """The configuration without what says where and when it was saved."""
    return {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "architectures", "dtype")}


def weights_in(folder):
    """Every tensor of a published checkpoint, by file and key."""
    files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".pth")]
    return {
        (str(path.relative_to(folder)), key): tensor[...]
        for path in files
        for key, tensor in open_weights(path.parent, path.name).items()
    }


def check_round_trip(model, processor, source, folder):
    write_published(model, processor, folder)
    written, published = weights_in(folder), weights_in(source)
    assert written.keys() == published.keys()
    for key, tensor in published.items():
        assert written[key].dtype == tensor.dtype and torch.equal(written[key], tensor), key
    again = read_published(folder)
    assert settings(again) == settings(model)
    names = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert names <= {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for name in names:
        if name.endswith("config.json") and "tokenizer" not in name and "generation" not in name:
            ours, theirs = (json.loads((root / name).read_text()) for root in (folder, source))
            assert {key: ours[key] for key in theirs.keys() & ours.keys()} == {
                key: theirs[key] for key in theirs.keys() & ours.keys()
            }


def test_published_round_trip_is_exact(model, processor, tmp_path):
    check_round_trip(model, processor, CHECKPOINT, tmp_path)


@pytest.fixture
def both_checkpoints(tmp_path):
    """The image checkpoint, and a video checkpoint of two latent frames whose own vision transformer is another."""
    folder = tmp_path / "both"
    shutil.copytree(CHECKPOINT, folder)
    shutil.copytree(folder / "Lance_3B", folder / "Lance_3B_Video")
    weights = load_file(folder / "Lance_3B" / "model.safetensors")
    table = LatentPositions(16, weights["latent_pos_embed.pos_embed"].shape[1]).compute(frames=2)
    vision = load_file(folder / "Qwen2.5-VL-ViT" / "vit.safetensors")
    bundled = {f"vit_model.{key}": tensor * 1.5 for key, tensor in vision.items()}
    weights |= {"latent_pos_embed.pos_embed": table, **bundled}
    save_file(weights, folder / "Lance_3B_Video" / "model.safetensors")
    return folder


def test_a_video_checkpoints_own_vision_transformer_wins(both_checkpoints, processor, model, tmp_path):
    image_model = AutoUnifiedModel.from_pretrained(both_checkpoints)
    video_model = AutoUnifiedModel.from_pretrained(both_checkpoints, variant="Lance_3B_Video")
    assert settings(image_model) == settings(model)
    assert (video_model.config.max_latent_size, video_model.config.latent_frames) == (16, 2)
    weight = "vit_model.merger.mlp.0.weight"
    assert torch.equal(image_model.get_parameter(weight), model.get_parameter(weight))
    assert torch.equal(video_model.get_parameter(weight), model.get_parameter(weight) * 1.5)

    video = tmp_path / "video"
    shutil.copytree(both_checkpoints, video, ignore=shutil.ignore_patterns("Lance_3B"))
    vision = {
        key.removeprefix("vit_model."): value for key, value in video_model.state_dict().items() if "vit_" in key
    }
    save_file(vision, video / "Qwen2.5-VL-ViT" / "vit.safetensors")  # what is written there is what the model has
    check_round_trip(read_published(video), processor, video, tmp_path / "again")

    with pytest.raises(
        CheckpointError, match=r"One folder of .* none is 'Lance_7B'\. These are there: Lance_3B, Lance_3B_Video\."
    ):
        AutoUnifiedModel.from_pretrained(both_checkpoints, variant="Lance_7B")


@pytest.mark.parametrize(("rows", "size"), [(64**2, (1, 64)), (31 * 64**2, (31, 64)), (2 * 16**2, (2, 16))])
def test_the_size_of_a_position_table(rows, size):
    assert table_size(rows) == size


def test_an_autoencoder_that_the_published_layout_cannot_say_is_refused(model, processor, tmp_path):
    altered = Model(model.config.__class__.from_dict(model.config.to_dict()))
    altered.config.vae_config["latents_mean"] = [0.0] * 48
    with pytest.raises(CheckpointError, match=r"latents_mean.*published layout cannot say"):
        write_published(altered, processor, tmp_path)
    assert not list(tmp_path.iterdir())


def test_save_pretrained_round_trip_is_exact(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, other = AutoUnifiedModel.from_pretrained(tmp_path), AutoUnifiedProcessor.from_pretrained(tmp_path)
    assert type(again) is Model and settings(again) == settings(model)
    tensors = dict(again.state_dict()) | dict(again.named_buffers())
    for name, tensor in [*model.state_dict().items(), *model.named_buffers()]:
        assert torch.equal(tensors[name], tensor), name
    assert "under the Qwen research licence" in str(folder_card(tmp_path, "me/lance"))
    assert other.system_prompts == processor.system_prompts
    assert other.understanding_resolutions == RESOLUTIONS
    images = pictures((64, 48), (64, 48), (64, 48))
    first, second = (p(images=images, text=ANSWERS, task="caption") for p in (processor, other))
    assert torch.equal(first["input_ids"], second["input_ids"])


def test_wide_grids_read_the_table_row_by_row():
    """As the original, whose widest bucket has more columns than its table."""
    positions = LatentPositions(8, 48)
    assert torch.equal(positions(3, 11)[11:22], positions.table[8 : 8 + 11])
    with pytest.raises(ValueError, match="exceeds the position table of side 8"):
        positions(9, 1)


def test_places_of_images_of_different_sizes():
    grids = torch.tensor([[2, 3], [1, 2]])
    ids, following = image_place(torch.tensor([5, 7]), grids, frame=1000)
    assert following.tolist() == [10, 11]
    assert ids[:, 0].T.tolist() == [
        [1000, 5, 5],
        [1004, 9, 9],
        *[[1001, 6 + row, 6 + column] for row in range(2) for column in range(3)],
    ]
    assert ids[:, 1, :4].T.tolist() == [[1000, 7, 7], [1003, 10, 10], [1001, 8, 8], [1001, 8, 9]]


@torch.no_grad()
@pytest.mark.parametrize("task", ["reconstruct", "caption"])
def test_conditions_of_different_sizes_make_one_batch(model, processor, task):
    images, columns = pictures((48, 36), (64, 64), (30, 50)), {"task": task}
    columns |= {"text": ANSWERS} if task == "caption" else {"size": (32, 48)}
    together = processor(images=images, **columns)
    assert isinstance(together["condition_pixel_values"], list)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    losses = model(**together, corruption=model.sample_corruption(together, generators)).per_sample_loss
    for index, image in enumerate(images):
        row = {name: [value[index]] if name == "text" else value for name, value in columns.items()}
        alone = processor(images=[image], **row)
        corruption = model.sample_corruption(alone, [torch.Generator().manual_seed(index)])
        torch.testing.assert_close(model(**alone, corruption=corruption).loss, losses[index], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_step_on_encoded_images_has_the_loss_of_a_step_on_images(model, processor):
    images = pictures((48, 36), (64, 64))
    batch = processor(images=images, instruction=["Describe it.", ""], size=(32, 48))
    corruption = model.sample_corruption(batch, [torch.Generator().manual_seed(seed) for seed in range(2)])
    encoded = processor(instruction=["Describe it.", ""]) | model.encode_batch(batch)
    assert not {"pixel_values", "condition_pixel_values"} & encoded.keys()
    torch.testing.assert_close(
        model(**encoded, corruption=corruption).loss, model(**batch, corruption=corruption).loss, rtol=0, atol=0
    )


def test_padded_rows_of_the_output_layer_learn_nothing(model, processor):
    batch = processor(images=pictures((48, 36)), text=ANSWERS[:1], task="caption")
    head = model.language_model.lm_head.weight
    output = model(**batch)
    (gradient,) = torch.autograd.grad(output.loss, head)
    length = len(processor.tokenizer)
    assert output.prediction.shape[1] == length < len(head)
    assert gradient[:length].abs().sum(1).min() > 0 and not gradient[length:].any()


def test_the_tasks_have_the_system_prompts_they_were_trained_with(processor):
    def words(batch, row=0):
        return processor.tokenizer.decode(batch["input_ids"][row])

    images = pictures((48, 36))
    begin = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    prompts = {use: begin.format(prompt) for use, prompt in processor.system_prompts.items()}
    assert words(processor(images=images, instruction=" a b ")) == f"{prompts['edit']}a b{end}"
    assert words(processor(images=images, text=["a b"], task="generate")) == f"{prompts['generate']}a b{end}"
    assert words(processor(images=[images * 2], text=["a b"], task="edit")) == f"{prompts['edit']}a b{end}"
    assert words(processor.prompt("sample", [""])) == f"{prompts['sample']}{end}"
    answer = "a lamp<|im_end|>"
    for question, use in (("", "caption"), ("What?", "question")):
        batch = processor(images=images, text=["a lamp"], instruction=[question], task="caption")
        assert words(batch) == f"{prompts[use]}{question}{end}{answer}"
        assert processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == answer
        before = batch["input_ids"][0, : batch["image_position"][0]]
        assert processor.tokenizer.decode(before) == prompts[use]
    contents = [
        ("system", "Be brief."),
        ("user", "What?<image>"),
        ("assistant", "a"),
        ("user", "And?"),
        ("assistant", "b"),
    ]
    conversation = [{"role": role, "content": content} for role, content in contents]
    batch = processor(images=images, text=[conversation], task="caption")
    turns = f"What?{end}a<|im_end|>\n<|im_start|>user\nAnd?{end}b<|im_end|>"
    assert words(batch) == begin.format("Be brief.") + turns


@pytest.mark.parametrize(
    ("size", "bounds", "expected"),
    [
        ((640, 480), {}, (672, 896)),
        ((640, 480), {"max_image_size": 512}, (384, 512)),
        ((512, 512), {"max_image_size": 1024}, (1024, 1024)),
        ((2100, 900), {"min_image_size": 512}, (512, 1200)),
        ((2100, 900), {"max_image_size": 512, "min_image_size": 256}, (208, 480)),
    ],
)
def test_bounds_choose_the_resolution_of_the_bucket(size, bounds, expected):
    processor = AutoUnifiedProcessor.from_pretrained(CHECKPOINT)
    assert processor.target_size(*size, **bounds) == expected
    for bad in ({"max_image_size": 8}, {"max_image_size": 64, "min_image_size": 128}):
        with pytest.raises(ValueError, match="at least 16 pixels and the minimum is not above the maximum"):
            processor.target_size(*size, **bad)


def test_resolutions_that_leave_no_embedding_are_refused():
    with pytest.raises(ValueError, match=r"understanding resolution 32 \(reconstruct\).*choose a larger one"):
        AutoUnifiedProcessor.from_pretrained(CHECKPOINT, understanding_resolutions={"reconstruct": 32})


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_guidance_without_a_cache_is_guidance_away_from_an_empty_prompt(model, processor, task):
    images = None if task == "generate" else pictures((48, 36))

    def generate(**options):
        generator = torch.Generator().manual_seed(0)
        (image,) = model.generate_images(
            processor, "a red kite", images, task=task, generator=generator, num_inference_steps=2,
            guidance_interval=(0.0, 1.0), **options,
        )  # fmt: skip
        return np.asarray(image).astype(int)

    cached, uncached, empty = generate(), generate(use_kv_cache=False), generate(negative_prompt="")
    assert np.array_equal(uncached, empty) and not np.array_equal(cached, uncached)
    unguided = generate(guidance_scale=1.0)
    assert np.array_equal(unguided, generate(guidance_scale=1.0, use_kv_cache=False))
    with pytest.raises(ValueError, match="guidance_renorm is 'global', 'channel' or 'none', not 'text_channel'"):
        generate(guidance_renorm="text_channel")


def test_questions_and_empty_ones_are_answered_as_alone(model, processor):
    images, questions = pictures((48, 36), (64, 64), (30, 50)), ["What is it?", "", "Where?"]
    together = model.generate_text(processor, questions, images, max_new_tokens=4)
    alone = [model.generate_text(processor, *row, max_new_tokens=4)[0] for row in zip(questions, images, strict=True)]
    assert together == alone


def test_lora_targets_are_the_generation_experts_layers(model):
    names = [name for name, _ in model.named_modules() if re.fullmatch(model.lora_target_modules, name)]
    assert len(names) == 7 * model.config.text_config.num_hidden_layers
    assert all("_moe_gen" in name for name in names)
