"""A small unified model that draws, and tiny randomly initialised detectors and classifiers."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    SwinConfig,
)

from reca_trainer.evaluation.geneval import COLORS
from reca_trainer.models.auto import AutoUnifiedModel, AutoUnifiedProcessor
from reca_trainer.models.contract import UnifiedModel, UnifiedOutput, UnifiedProcessor, per_sample

SIDE = 16


class PainterConfig(PreTrainedConfig):
    model_type = "painter"


class PainterProcessor(UnifiedProcessor):
    """Images become `[B, 3, 16, 16]`, whatever their size."""

    def __init__(self):
        super().__init__()

    def __call__(self, images=None, text=None, instruction=None, task="reconstruct", size=None):
        arrays = [np.asarray(image.resize((SIDE, SIDE))) for image in images]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return {"task": task, "pixel_values": pixels, "condition_pixel_values": pixels}


class PainterModel(UnifiedModel):
    """Paints a plane in a colour that its embedding gives the prompt, with noise; sees an image's mean colour."""

    config_class = PainterConfig

    def __init__(self, config):
        super().__init__(config)
        self.color_of_byte = nn.Embedding(256, 3)
        self.see = nn.Linear(3, 3)
        self.drawn = []
        self.post_init()

    @property
    def understanding_modules(self):
        return []

    def sample_corruption(self, batch, generator=None):
        draw = lambda g: torch.randn(3, SIDE, SIDE, generator=g)  # noqa: E731
        return {"noise": per_sample(draw, len(batch["pixel_values"]), generator)}

    def forward(self, task, corruption=None, **batch):
        corruption = self.sample_corruption(batch) if corruption is None else corruption
        seen = self.see(batch["condition_pixel_values"].mean((2, 3)))[..., None, None]
        losses = ((seen + corruption["noise"] - batch["pixel_values"]) ** 2).mean((1, 2, 3))
        return UnifiedOutput(loss=losses.mean(), per_sample_loss=losses.detach())

    @torch.no_grad()
    def generate_images(self, processor, text=None, images=None, *, task="generate", generator=None, contrast=1.0):
        if task == "reconstruct":
            colors = self.see(processor(images=images)["condition_pixel_values"].mean((2, 3)))
        else:
            self.drawn += text
            colors = torch.stack([self.color_of_byte(torch.tensor(list(prompt.encode()))).mean(0) for prompt in text])
        noise = per_sample(lambda g: torch.randn(3, SIDE, SIDE, generator=g), len(colors), generator)
        pixels = ((contrast * 4 * colors[..., None, None] + 0.3 * noise).sigmoid() * 255).to(torch.uint8)
        return [Image.fromarray(plane.permute(1, 2, 0).contiguous().numpy()) for plane in pixels]

    @torch.no_grad()
    def generate_text(self, processor, text, images=None, **sampling):
        colors = processor(images=images)["pixel_values"].mean((2, 3))
        return [f"{('Red', 'Green', 'Blue')[int(color.argmax())]}." for color in colors]


@pytest.fixture
def painter():
    torch.manual_seed(0)
    return SimpleNamespace(model=PainterModel(PainterConfig()), processor=PainterProcessor())


@pytest.fixture(scope="session")
def bagel_folder(tmp_path_factory):
    """The tiny BAGEL of the reference cases, with a processor for images of its size."""
    source, folder = Path(__file__).parents[1] / "golden" / "bagel" / "checkpoint", tmp_path_factory.mktemp("bagel")
    AutoUnifiedModel.from_pretrained(source).save_pretrained(folder)
    processor = AutoUnifiedProcessor.from_pretrained(source)
    processor.generation_size, processor.condition_size = (32, 32, 16), (28, 28, 14)
    processor.understanding_size = (56, 28, 14)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory):
    """A Mask2Former for 80 classes with random weights: 0.1 million parameters."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mask2former")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = SwinConfig(
        image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=stages
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=80,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}, size_divisor=32).save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP with random weights and a vocabulary of words: 0.02 million parameters."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    words = ["a", "photo", "of", "an", "object", "colored", "-", "dog", "cat", *COLORS]
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[BOS]", "[EOS]", "[PAD]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]", pad_token="[PAD]"
    )
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**text, "image_size": 32, "patch_size": 8}
    text |= {"vocab_size": len(vocabulary), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory):
    """A LLaVA with random weights, large enough that its answers depend on image and question."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava")
    words = ["[UNK]", "[BOS]", "[EOS]", "[PAD]", "<image>", "yes", "no", "is", "it", "red", "or", "with", ".", "?"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        pad_token="[PAD]",
        extra_special_tokens={"image_token": "<image>"},
    )
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}",
    ).save_pretrained(folder)
    layer = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "initializer_range": 1.0}
    vision = CLIPVisionConfig(**layer, num_hidden_layers=2, image_size=16, patch_size=8)
    text = LlamaConfig(
        **layer,
        num_hidden_layers=1,
        num_key_value_heads=2,
        vocab_size=len(words),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=4)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)
