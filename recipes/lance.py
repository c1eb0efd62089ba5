"""RecA on Lance: the generation expert is trained, everything else is frozen.

The whole job on a tiny Lance and the world of shapes, in minutes on a laptop's CPU:

    accelerate launch recipes/lance.py

The real run on your own images, a folder or a dataset id:

    accelerate launch recipes/lance.py --config lance_lora \
        --model_name_or_path bytedance-research/Lance --dataset_name path/to/images
"""

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from reca_trainer.cli.train import run
from reca_trainer.models.lance import Config, Model, Processor
from reca_trainer.toy.pretraining import pretrain
from reca_trainer.toy.tokenizer import make_tokenizer


def build():
    tokenizer = make_tokenizer()
    tokens = ("<|vision_start|>", "<|vision_end|>", "<|im_end|>")
    config = Config.tiny(len(tokenizer), *map(tokenizer.convert_tokens_to_ids, tokens))
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
    frames = model.vae.decoder(model.vae.post_quant_conv(latents[:, :, None]), first_chunk=True)
    return unpatchify(frames, model.vae.config.patch_size)[:, :, 0]


def tiny(**steps):
    steps = {"autoencoder_steps": 700, "understanding_steps": 300, **steps}
    return pretrain(build, "vae", encode, decode, continuous=True, **steps)


if __name__ == "__main__":
    run(tiny, "lance_tiny")
