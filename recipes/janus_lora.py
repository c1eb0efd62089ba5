"""RecA on Janus with a LoRA adapter on the language model.

The whole job on a tiny Janus and the world of shapes, in minutes on a laptop's CPU:

    accelerate launch recipes/janus_lora.py

The real run, with image-to-text data because Janus understands and generates with the same language model:

    accelerate launch recipes/janus_lora.py --config janus_lora_1b \
        --model_name_or_path deepseek-community/Janus-Pro-1B \
        --dataset_name path/to/images --caption_dataset_name path/to/conversations
"""


import torch.nn.functional as F

from reca_trainer.cli.train import run
from reca_trainer.models.janus import Config, Model, Processor
from reca_trainer.toy.pretraining import pretrain
from reca_trainer.toy.tokenizer import make_tokenizer


def build():
    tokenizer = make_tokenizer()
    config = Config.tiny(len(tokenizer) + 6, image_size=16, patch_size=2)
    # With 32 channels, each is a group of its own at the last normalisation, which would take its colour away.
    config.vq_config.channel_multiplier = [2, 2]
    return Model(config), Processor.tiny(config, tokenizer)


def encode(model, pixels):
    """The code of the smallest angle; its gradient reaches encoder and codebook through the softer choice beside it."""
    vq = model.model.vqmodel
    latents = F.normalize(vq.quant_conv(vq.encoder(pixels)).movedim(1, -1), dim=-1)
    codebook = F.normalize(vq.quantize.embedding.weight, dim=-1)
    soft = (latents @ codebook.T / 0.05).softmax(dim=-1)
    hard = F.one_hot(soft.argmax(dim=-1), soft.shape[-1])
    return ((hard + soft - soft.detach()) @ codebook).movedim(-1, 1) * codebook.shape[1] ** 0.5  # variance 1


def decode(model, codes):
    vq = model.model.vqmodel
    return vq.decoder(vq.post_quant_conv(codes / codes.shape[1] ** 0.5))


def tiny(**steps):
    return pretrain(build, "model.vqmodel", encode, decode, continuous=False, **steps)


if __name__ == "__main__":
    run(tiny, "janus_lora_tiny")
