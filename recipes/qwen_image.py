"""RecA on Qwen-Image-Edit: the diffusion transformer is trained, Qwen2.5-VL and the autoencoder are frozen.

The whole job on a tiny Qwen-Image-Edit and the world of shapes, in minutes on a laptop's CPU:

    accelerate launch recipes/qwen_image.py

The real run on your own images, a folder or a dataset id:

    accelerate launch recipes/qwen_image.py --config qwen_image_edit_qlora \
        --model_name_or_path Qwen/Qwen-Image-Edit-2511 --dataset_name path/to/images
"""

import torch

from reca_trainer.cli.train import run
from reca_trainer.models.qwen_image import Config, Model, Processor
from reca_trainer.toy.pretraining import pretrain
from reca_trainer.toy.tokenizer import make_tokenizer


def build():
    tokenizer = make_tokenizer()
    config = Config.tiny(len(tokenizer) + 1)
    model = Model(config)
    channels = config.vae_config["z_dim"]
    with torch.no_grad():  # only the posterior's mean is fitted: its variance is as good as none
        model.vae.quant_conv.weight[channels:].zero_()
        model.vae.quant_conv.bias[channels:].fill_(-12.0)
    return model, Processor.tiny(config, tokenizer)


def encode(model, pixels):
    return model.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]


def decode(model, latents):
    # As `vae.decode`, but for its clamp to [-1, 1]: pixels that begin beyond it would learn nothing.
    return model.vae.decoder(model.vae.post_quant_conv(latents[:, :, None]))[:, :, 0]


def tiny(**steps):
    steps = {"autoencoder_steps": 500, "understanding_steps": 400, "generator_steps": 300, **steps}
    return pretrain(build, "vae", encode, decode, continuous=True, **steps)


if __name__ == "__main__":
    run(tiny, "qwen_image_tiny")
