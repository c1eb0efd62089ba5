"""What the information bottleneck is for: a Show-o whose condition is its target learns to copy and forgets to paint."""

import logging

import pytest
import torch

from reca_trainer import RecAConfig, RecATrainer, toy
from reca_trainer.models.show_o import Config, Model, Processor
from reca_trainer.toy.tokenizer import make_tokenizer


def train(model, processor, folder, **options):
    args = RecAConfig(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        adam_epsilon=1e-8,
        image_to_text_weight=0.0,
        instruction_dropout=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        collapse_threshold=0.5,
        **options,
    )
    RecATrainer(model, args, train_dataset=toy.dataset("train", 256), processing_class=processor).train()


@torch.no_grad()
def text_to_image_loss(model, processor):
    """Held out, with fixed masks."""
    rows = toy.dataset("validation", 64)
    batch = processor(images=list(rows["image"]), text=list(rows["text"]), task="generate")
    generators = [torch.Generator().manual_seed(index) for index in range(len(rows))]
    return float(model.eval()(corruption=model.sample_corruption(batch, generators), **batch).loss)


def test_copying_the_target_raises_the_alarm_and_forgets_text_to_image(tmp_path, caplog):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = Config.tiny(len(tokenizer), tokenizer.eos_token_id, image_size=8, w_clip_vit=False)
    model = Model(config)
    with pytest.warns(UserWarning, match="collapse"):
        processor = Processor.from_config(tokenizer, config, down_scale=1)
    train(model, processor, tmp_path, max_steps=20, reca_weight=0.0, text_to_image_weight=1.0)
    before = text_to_image_loss(model, processor)

    with caplog.at_level(logging.WARNING):
        train(model, processor, tmp_path, max_steps=400)
    assert "Collapse alarm" in caplog.text
    assert text_to_image_loss(model, processor) > before
