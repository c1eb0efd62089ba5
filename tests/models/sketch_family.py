"""A whole family in one small module: what `ADDING_A_FAMILY.md` explains. It draws 8 × 8 pixels from an embedding."""

import torch
from torch import nn
from transformers import PreTrainedConfig

from reca_trainer import UnifiedModel, UnifiedProcessor, register_family
from reca_trainer.models.common.flow_matching import flow_loss, interpolate
from reca_trainer.models.common.padding import pad_rows, padding_mask
from reca_trainer.models.common.pixels import to_images, to_pixels
from reca_trainer.models.common.texts import word_ids
from reca_trainer.models.contract import check_only_size, one_per_sample, per_sample


class Config(PreTrainedConfig):
    model_type = "sketch"
    image_size: int = 8
    hidden_size: int = 32
    vocab_size: int = 512
    initializer_range: float = 0.2


class Model(UnifiedModel):
    config_class = Config
    tasks = ("reconstruct", "generate")
    lora_target_modules = r"generator\.[02]"
    understanding_modules = ("encoder",)
    generation_modules = ("embedding", "generator")

    def __init__(self, config):
        super().__init__(config)
        pixels, width = 3 * config.image_size**2, config.hidden_size
        self.encoder = nn.Linear(pixels, width)
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.generator = nn.Sequential(nn.Linear(pixels + width + 1, 64), nn.SiLU(), nn.Linear(64, pixels))
        self.post_init()

    def encode_condition(self, condition_pixel_values):
        return self.encoder(condition_pixel_values.flatten(1))[:, None]  # [B, 1, D]

    def encode_target(self, pixel_values):
        return pixel_values.flatten(1)  # [B, N]

    def decode_target(self, target):
        return target.unflatten(1, (3, self.config.image_size, self.config.image_size))

    def sample_corruption(self, batch, generator=None):
        shape, count = 3 * self.config.image_size**2, len(batch["pixel_values"])
        return {
            "noise": per_sample(lambda draw: torch.randn(shape, generator=draw), count, generator),
            "timesteps": per_sample(lambda draw: torch.rand(1, generator=draw), count, generator),
        }

    def count_supervised(self, batch, corruption):
        return corruption["noise"].numel()

    def example_batch(self, batch_size, max_image_size=None, min_image_size=None, text_length=32):
        check_only_size(self.config.image_size, max_image_size, min_image_size)
        pixels = torch.zeros(batch_size, 3, self.config.image_size, self.config.image_size)
        input_ids = torch.zeros(batch_size, 1, dtype=torch.long)  # the first token is all it reads
        return {
            "task": "reconstruct",
            "condition_pixel_values": pixels,
            "pixel_values": pixels,
            "input_ids": input_ids,
        }

    def _reconstruct(self, corruption, condition_pixel_values, pixel_values, input_ids, attention_mask):
        condition = self.encode_condition(condition_pixel_values)  # [B, 1, D]
        words = self.read(input_ids, attention_mask)
        return self._flow_loss(condition[:, 0] + words, pixel_values, corruption, condition)

    def _generate(self, corruption, pixel_values, input_ids, attention_mask):
        return self._flow_loss(self.read(input_ids, attention_mask), pixel_values, corruption)

    def read(self, input_ids, attention_mask):
        words = self.embedding(input_ids) * attention_mask[..., None]
        return words.sum(1) / attention_mask.sum(1, keepdim=True)  # [B, D]: the mean of a text's tokens

    def _flow_loss(self, condition, pixel_values, corruption, understanding_embeds=None):
        clean, noise = self.encode_target(pixel_values), corruption["noise"].to(self.device)
        time = corruption["timesteps"].to(self.device)
        velocity = self.velocity(interpolate(clean, noise, time), condition, time)  # [B, N]
        return flow_loss(velocity, noise - clean, understanding_embeds=understanding_embeds)

    def velocity(self, noisy, condition, time):
        return self.generator(torch.cat([noisy, condition, time], dim=1).to(self.dtype))

    def _generate_images(self, processor, text, images, *, task, generator, num_inference_steps=4):
        prompts = text or [""] * len(images)
        batch = processor(images, prompts, prompts, task)
        condition = self.read(batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device))
        if task == "reconstruct":
            condition = condition + self.encode_condition(batch["condition_pixel_values"].to(self.device))[:, 0]
        size = 3 * self.config.image_size**2
        image = per_sample(lambda draw: torch.randn(size, generator=draw), len(prompts), generator).to(self.device)
        for step in range(num_inference_steps, 0, -1):
            time = torch.full_like(image[:, :1], step / num_inference_steps)
            image = image - self.velocity(image, condition, time) / num_inference_steps
        return to_images(self.decode_target(image))


class Processor(UnifiedProcessor):
    def __init__(self, tokenizer=None, image_size=8, max_text_length=64, **kwargs):
        self.image_size = image_size
        self.max_text_length = max_text_length
        super().__init__(tokenizer, **kwargs)

    @property
    def fixed_size(self):
        return (self.image_size, self.image_size)

    def __call__(
        self, images=None, text=None, instruction=None, task="reconstruct", size=None, *, crop=None, dropped=None
    ):
        batch = {"task": task}
        if images is not None:
            pixels = to_pixels([image.resize((self.image_size, self.image_size)) for image in images])
            batch["pixel_values"] = pixels
            if task == "reconstruct":
                batch["condition_pixel_values"] = pixels
        words = text if task == "generate" else one_per_sample(instruction, len(images))
        words = ["" if drop else word for word, drop in zip(words, one_per_sample(dropped, len(words)), strict=True)]
        # A dropped text has one token, too. Names of special tokens are words, and a long text loses its end.
        rows = [[self.tokenizer.bos_token_id, *word_ids(self.tokenizer, word or "")] for word in words]
        rows = [self.shorten(row, self.max_text_length) for row in rows]
        input_ids = pad_rows(rows, self.tokenizer.pad_token_id)
        return {**batch, "input_ids": input_ids, "attention_mask": padding_mask(rows)}


register_family("sketch", __name__)
