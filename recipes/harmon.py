"""RecA on Harmon, all of it but the autoencoder.

The whole job on a tiny Harmon and the world of shapes, in minutes on a laptop's CPU:

    accelerate launch recipes/harmon.py

The real run, with image-to-text data because Harmon understands and generates with the same weights:

    accelerate launch recipes/harmon.py --config harmon_1_5b --model_name_or_path wusize/Harmon-1_5B \
        --dataset_name path/to/images --caption_dataset_name path/to/conversations
"""


from reca_trainer.cli.train import run
from reca_trainer.models.harmon import Config, Model, Processor
from reca_trainer.toy.pretraining import pretrain
from reca_trainer.toy.tokenizer import make_tokenizer


def build():
    tokenizer = make_tokenizer()
    config = Config.tiny(len(tokenizer))
    config.mar_config.img_size, config.mar_config.vae_stride, config.mar_config.buffer_size = 16, 2, 16
    for name in ("down_block_types", "up_block_types", "block_out_channels"):  # tokens of 2 × 2 pixels
        config.vae_config[name] = config.vae_config[name][1:]
    config.vae_config["norm_num_groups"] = 8  # 32 groups of one channel would normalise colours away
    config.text_config.hidden_size, config.text_config.intermediate_size = 128, 384
    return Model(config), Processor.tiny(config, tokenizer)


def encode(model, pixels):
    return model.vae.encode(pixels).latent_dist.mean


def decode(model, latents):
    return model.vae.decode(latents).sample


def tiny(**steps):
    return pretrain(build, "vae", encode, decode, continuous=True, **steps)


if __name__ == "__main__":
    run(tiny, "harmon_tiny")
