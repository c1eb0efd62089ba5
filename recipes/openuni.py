"""RecA on OpenUni: queries, connector and SANA are trained, InternVL and the autoencoder are frozen.

The whole job on a tiny OpenUni and the world of shapes, in minutes on a laptop's CPU:

    accelerate launch recipes/openuni.py

The real run on your own images, a folder or a dataset id:

    accelerate launch recipes/openuni.py --config openuni_1_6b \
        --model_name_or_path path/to/openuni --dataset_name path/to/images
"""


from reca_trainer.cli.train import run
from reca_trainer.models.openuni import Config, Model, Processor
from reca_trainer.toy.pretraining import pretrain
from reca_trainer.toy.tokenizer import make_tokenizer


def build():
    tokenizer = make_tokenizer()
    config = Config.tiny(len(tokenizer) + 3)
    config.transformer_config["interpolation_scale"] = 1.0  # positions, which a deep SANA learns from the borders
    return Model(config), Processor.tiny(config, tokenizer)


def encode(model, pixels):
    return model.vae.encode(pixels).latent * model.vae.config.scaling_factor


def decode(model, latents):
    return model.vae.decode(latents / model.vae.config.scaling_factor).sample


def tiny(**steps):
    return pretrain(build, "vae", encode, decode, continuous=True, **{"autoencoder_steps": 400, **steps})


if __name__ == "__main__":
    run(tiny, "openuni_tiny")
