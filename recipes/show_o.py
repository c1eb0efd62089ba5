"""RecA on Show-o: its language model is trained, CLIP and the image tokenizer are frozen.

The whole job on a tiny Show-o and the world of shapes, in minutes on a laptop's CPU:

    accelerate launch recipes/show_o.py

The real run, with image-to-text data because Show-o understands and generates with the same weights:

    accelerate launch recipes/show_o.py --config show_o_clip_512 \
        --model_name_or_path showlab/show-o-w-clip-vit-512x512 \
        --dataset_name path/to/images --caption_dataset_name path/to/conversations
"""


from reca_trainer.cli.train import run
from reca_trainer.models.show_o import Config, Model, Processor
from reca_trainer.toy.pretraining import pretrain
from reca_trainer.toy.tokenizer import make_tokenizer


def build():
    tokenizer = make_tokenizer()
    config = Config.tiny(len(tokenizer), tokenizer.eos_token_id, image_size=16)
    # Tokens of 2 × 2 pixels. With 32 channels, each is a group of its own at the last normalisation, which would take its
    # colour away.
    config.vq_config |= {"encoder_channel_multipliers": [1, 2], "decoder_channel_multipliers": [2, 2]}
    config.num_vq_tokens = 64
    config.text_config.hidden_size, config.text_config.intermediate_size = 128, 512
    return Model(config), Processor.from_config(tokenizer, config)


def encode(model, pixels):
    bits = model.vq_model.encoder(pixels).tanh()
    return bits + (bits.sign() - bits).detach()


def decode(model, codes):
    return model.vq_model.decoder(codes)


def tiny(**steps):
    return pretrain(build, "vq_model", encode, decode, continuous=False, **steps)


if __name__ == "__main__":
    run(tiny, "show_o_tiny")
