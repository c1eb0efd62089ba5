"""RecA on Qwen-Image-Edit: the diffusion transformer is trained, Qwen2.5-VL and the autoencoder are frozen.

The whole job on a tiny Qwen-Image-Edit and the world of shapes, in minutes on a laptop's CPU:

    accelerate launch recipes/qwen_image.py

The real run on your own images, a folder or a dataset id:

    accelerate launch recipes/qwen_image.py --config qwen_image_edit_qlora \
        --model_name_or_path Qwen/Qwen-Image-Edit-2511 --dataset_name path/to/images
"""

from reca_trainer.cli.train import run
from reca_trainer.models.qwen_image import Config, Model, Processor
from reca_trainer.toy.pretraining import pretrain
from reca_trainer.toy.tokenizer import make_tokenizer
from reca_trainer.toy.video_autoencoder import decode, encode


def build():
    tokenizer = make_tokenizer()
    config = Config.tiny(len(tokenizer) + 1)
    # Latents of 2 × 2 pixels and few layers: in as much time, the ones of 4 × 4 pixels learn no colours.
    config.vae_config |= {"dim_mult": [1, 1], "num_res_blocks": 0, "temperal_downsample": [False]}
    return Model(config), Processor.tiny(config, tokenizer)


def tiny(**steps):
    steps = {"autoencoder_steps": 900, "understanding_steps": 400, "generator_steps": 400, **steps}
    return pretrain(build, "vae", encode, decode, continuous=True, **steps)


if __name__ == "__main__":
    run(tiny, "qwen_image_tiny")
