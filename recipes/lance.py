"""RecA on Lance: the generation expert is trained, everything else is frozen.

The whole job on a tiny Lance and the world of shapes, in minutes on a laptop's CPU:

    accelerate launch recipes/lance.py

The real run on your own images, a folder or a dataset id:

    accelerate launch recipes/lance.py --config lance_lora \
        --model_name_or_path bytedance-research/Lance --dataset_name path/to/images
"""

import torch

from reca_trainer.cli.train import run
from reca_trainer.models.lance import Config, Model, Processor
from reca_trainer.toy.pretraining import pretrain
from reca_trainer.toy.tokenizer import make_tokenizer
from reca_trainer.toy.video_autoencoder import decode, encode


def build():
    tokenizer = make_tokenizer()
    tokens = ("<|vision_start|>", "<|vision_end|>", "<|im_end|>")
    config = Config.tiny(len(tokenizer), *map(tokenizer.convert_tokens_to_ids, tokens))
    # Latents of 2 × 2 pixels, four to a token, and few layers: in as much time, the ones of 4 × 4 pixels learn no colours.
    config.vae_config |= {"dim_mult": [1], "temperal_downsample": [], "scale_factor_spatial": 2, "num_res_blocks": 0}
    config.vae_config |= {"base_dim": 24, "decoder_base_dim": 24}
    config.latent_patch_size = 2
    model = Model(config)
    layer, channels = model.vae.quant_conv, config.vae_config["z_dim"]
    with torch.no_grad():  # only the posterior's mean is fitted: its variance is as good as none
        layer.weight[channels:].zero_()
        layer.bias[channels:].fill_(-12.0)
    return model, Processor.tiny(config, tokenizer)


def tiny(**steps):
    steps = {"autoencoder_steps": 700, "understanding_steps": 300, **steps}
    return pretrain(build, "vae", encode, decode, continuous=True, **steps)


if __name__ == "__main__":
    run(tiny, "lance_tiny")
