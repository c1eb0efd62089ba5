"""BAGEL against the outputs of the original implementation, one test per case.

A case packs several samples into one sequence; samples never see each other, so each is computed on its own.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from reca_trainer.models.auto import AutoUnifiedModel, AutoUnifiedProcessor
from reca_trainer.models.bagel import generation_bagel
from reca_trainer.models.bagel.processing_bagel import resized_size
from reca_trainer.models.common.flow_matching import shift_timesteps
from reca_trainer.models.common.latents import patchify
from tests.conftest import Golden

GOLDEN = Golden("bagel")
TOLERANCE = GOLDEN.info["suggested_tolerance"]
RULES = {
    name: (rule["max_image_size"], rule["min_image_size"], rule["image_stride"])
    for name, rule in GOLDEN.info["transforms"].items()
}


@pytest.fixture(scope="module")
def processors():
    """By kind of case. The reference reconstructs from embeddings at the size of questions, not at RecA's."""
    vae = {"train": RULES["train_vae"], "inference": RULES["infer_vae"]}
    vit = {"train": RULES["train_vit"], "inference": RULES["infer_vit"]}
    return {
        kind: AutoUnifiedProcessor.from_pretrained(
            GOLDEN.checkpoint,
            generation_size=vae[kind],
            condition_size=vit[kind],
            understanding_size=RULES["infer_vit"],
        )
        for kind in vae
    }


@pytest.fixture(scope="module")
def model():
    return AutoUnifiedModel.from_pretrained(GOLDEN.checkpoint).eval()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=TOLERANCE["float32_tensors_atol"], rtol=0)


def image(tensors, index):
    return Image.fromarray(tensors[f"raw_image_{index}"].numpy())


class Pack:
    """Walks through a training case split by split, handing out its packed draws in order."""

    def __init__(self, model, processor, case, tensors):
        self.model, self.processor, self.case, self.tensors = model, processor, case, tensors
        self.images = self.latent_tokens = self.vit_tokens = 0
        self.squared_errors, self.token_losses = [], []

    def latents(self, pixels):
        """The case's (padded) latent of the next VAE image, after checking our own encoder against the same padding."""
        stride = self.model.config.vae_scale_factor
        height, width = (side // stride for side in pixels.shape[-2:])
        padded = self.tensors["padded_latent"][self.images : self.images + 1]
        canvas = torch.zeros(1, 3, *(side * stride for side in padded.shape[-2:]))
        canvas[..., : pixels.shape[-2], : pixels.shape[-1]] = pixels
        noise = self.tensors["vae_sample_noise"][self.images : self.images + 1]
        close(self.model.encode_target(canvas, noise), padded)
        if (mean := self.tensors.get(f"vae_mean_unpadded_{self.images}")) is not None:
            close(self.model.vae.encode(pixels).latent_dist.mean.view_as(mean), mean)
        self.images += 1
        return padded[..., :height, :width]

    def run(self):
        for sample in self.case["samples"]:
            context = self.model.new_context(1)
            for split in sample:
                context = getattr(self, split["type"])(context, split)
        losses = {}
        if self.squared_errors:
            losses["loss_mse"] = torch.cat(self.squared_errors).mean()
        if self.token_losses:
            losses["loss_ce"] = torch.cat(self.token_losses).mean()
        return losses

    def text(self, context, split):
        if split["dropped"]:
            return context
        tokens = self.processor.tokenize([split["text"]])["input_ids"]
        assert tokens[0, 1:-1].tolist() == split["text_ids"]
        if split["loss"]:
            hidden, _, context = self.model._read(context, self.model.embed(tokens), causal=True)
            logits = self.model.language_model.lm_head(self.model.language_model.model.norm(hidden))[0, :-1]
            if not self.token_losses and "ce_logits_first4" in self.tensors:
                first = self.tensors["ce_logits_first4"]
                close(logits[: len(first)], first[: len(logits)])
            token_loss = F.cross_entropy(logits, tokens[0, 1:], reduction="none")
            done = sum(map(len, self.token_losses))
            close(token_loss, self.tensors["ce_per_token"][done : done + len(token_loss)])
            self.token_losses.append(token_loss)
            return context
        return self.model.read_text(context, tokens)

    def vit_image(self, context, split):
        if split["dropped"]:
            return self.model.skip(context)
        pixels = self.processor.to_pixels([image(self.tensors, split["image"])], self.processor.condition_size)
        if (stored := self.tensors.get(f"vit_image_{split['image']}")) is not None:
            close(pixels[0], stored)
        embeds = self.model.encode_condition(pixels)
        end = self.vit_tokens + embeds.shape[1]
        if "connector_out" in self.tensors:
            close(embeds[0], self.tensors["connector_out"][self.vit_tokens : end])
        if "vit_out" in self.tensors:
            close(self.model.vit_model(pixels)[0], self.tensors["vit_out"][self.vit_tokens : end])
        self.vit_tokens = end
        return self.model.read_image(context, embeds, pixels.shape[-2:])

    def vae_image(self, context, split):
        if split["dropped"]:
            return self.model.skip(context)
        pixels = self.processor.to_pixels([image(self.tensors, split["image"])], self.processor.generation_size)
        if (stored := self.tensors.get(f"vae_image_{split['image']}")) is not None:
            close(pixels[0], stored)
        latents = self.latents(pixels)
        clean, _ = patchify(latents, self.model.config.latent_patch_size)
        start, end = self.latent_tokens, self.latent_tokens + clean.shape[1]
        self.latent_tokens = end
        if not split["loss"]:
            return self.model.read_latents(context, latents)
        timestep = shift_timesteps(
            self.tensors["packed_timesteps"][start : start + 1].sigmoid(), self.case["timestep_shift"]
        )
        close(timestep, self.tensors["timesteps_shifted"][start : start + 1])
        corruption = {"noise": self.tensors["flow_noise"][None, start:end], "timesteps": timestep}
        output = self.model._flow_matching(context, latents, corruption)
        error = (output.prediction - output.target).square().mean(-1)[0]
        done = sum(map(len, self.squared_errors))
        close(output.prediction[0], self.tensors["velocity_pred"][done : done + len(error)])
        close(error, self.tensors["mse_per_token"][done : done + len(error)])
        self.squared_errors.append(error)
        return context


def check_training(model, processor, case, tensors):
    freezings = [name.removeprefix("grad_norms_") for name in case if name.startswith("grad_norms_")] or ["unfrozen"]
    for freezing in freezings:
        model.zero_grad(set_to_none=True)
        model.requires_grad_(True)
        if freezing == "official_freezing":
            model.freeze_understanding()
        losses = Pack(model, processor, case, tensors).run()
        total = sum(losses.values())
        for name, value in {**losses, "loss": total}.items():
            assert value.item() == pytest.approx(case["expected"][name], rel=TOLERANCE["losses_rtol"])
        if not total.requires_grad:
            continue
        total.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert not any(name.startswith("vae.") for name in gradients)
        for name, norm in case.get(f"grad_norms_{freezing}", {}).items():
            total_norm = gradients[name].norm().item() if name in gradients else 0.0
            assert total_norm == pytest.approx(norm or 0.0, rel=TOLERANCE["grad_norms_rtol"]), name
        if (norm := case.get(f"grad_norm_total_{freezing}")) is not None:
            squares = sum(gradient.double().square().sum() for gradient in gradients.values())
            assert squares.sqrt().item() == pytest.approx(norm, rel=TOLERANCE["grad_norms_rtol"])


def check_text_generation(model, processor, case, tensors):
    assert not case["hyper"]["do_sample"], "only greedy answers can be compared"
    ids = tensors["generated_ids"].tolist()
    limit = case["hyper"]["max_think_token_n"]
    raw = image(tensors, 0)
    resized = processor.resize(raw, processor.generation_size)
    assert torch.equal(torch.from_numpy(np.array(resized)), tensors["resized_image"])
    pixels = processor.to_pixels([resized], processor.understanding_size)
    embeds = model.encode_condition(pixels)
    close(embeds[0], tensors["connector_out"])
    context = model.read_image(model.new_context(1), embeds, pixels.shape[-2:])
    context = model.read_text(context, processor.tokenize([case["prompt"]])["input_ids"])
    for token, logits in zip(ids, tensors["step_logits"], strict=True):
        hidden, _, context = model._read(context, model.embed(torch.tensor([[token]])), causal=True)
        close(model.language_model.lm_head(model.language_model.model.norm(hidden))[0, 0], logits)
    answer = model.generate_text(processor, [case["prompt"]], [raw], max_new_tokens=limit - 1)
    ended = [token for token in ids[1:] if token != model.config.eos_token_id]
    assert answer == [processor.tokenizer.decode(ended)]


def check_image_generation(model, processor, case, tensors, monkeypatch):
    hyper = case["hyper"]
    images = [image(tensors, 0)] if "raw_image_0" in tensors else None
    assert "raw_image_1" not in tensors, "an image is generated from one image at most"
    task = "generate" if images is None else "edit" if "vae_context_latent" in tensors else "reconstruct"

    calls = {}  # function -> its results, in order
    steps = {}  # timestep -> the velocity it is left with, guided or not

    def record(owner, name):
        original = getattr(owner, name)

        def recorded(*args):
            calls.setdefault(name, []).append((args, original(*args)))
            return calls[name][-1][1]

        monkeypatch.setattr(owner, name, recorded)

    for name in ("encode_condition", "encode_target", "decode_target"):
        record(model, name)
    record(generation_bagel, "unpatchify")
    velocity, guide = model.velocity, generation_bagel.guide

    def recorded_velocity(context, noisy, timesteps, grid):
        result = velocity(context, noisy, timesteps, grid)
        steps.setdefault(timesteps[0].item(), result)
        return result

    def recorded_guide(*args):
        steps[list(steps)[-1]] = guide(*args)
        return steps[list(steps)[-1]]

    monkeypatch.setattr(model, "velocity", recorded_velocity)
    monkeypatch.setattr(generation_bagel, "guide", recorded_guide)
    height, width = case["context"]["image_shape"]
    result = model.generate_images(
        processor,
        text=[case["prompt"]],
        images=images,
        task=task,
        height=height,
        width=width,
        num_inference_steps=hyper["num_timesteps"] - 1,
        guidance_scale=hyper["cfg_text_scale"],
        image_guidance_scale=hyper["cfg_img_scale"],
        guidance_interval=tuple(hyper["cfg_interval"]),
        guidance_renorm=hyper["cfg_renorm_type"],
        guidance_renorm_min=hyper["cfg_renorm_min"],
        timestep_shift=hyper["timestep_shift"],
        latents=tensors["init_noise"][None],
        posterior_noise=tensors.get("vae_sample_noise"),
    )
    if "connector_out" in tensors:
        close(calls["encode_condition"][0][1][0], tensors["connector_out"])
    if "vae_context_latent" in tensors:
        latent = calls["encode_target"][0][1]
        close(latent, tensors["vae_context_latent"].view_as(latent))
    assert list(steps) == pytest.approx(case["timesteps"])
    velocities = list(steps.values())
    close(velocities[0][0], tensors["first_velocity"])
    close(velocities[-1][0], tensors["last_velocity"])
    close(calls["unpatchify"][0][0][0][0], tensors["final_latent"])
    if "decoded_image" in tensors:
        decoded = calls["decode_target"][0][1]
        close(decoded, tensors["decoded_image"].view_as(decoded))
    levels = torch.from_numpy(np.array(result[0])).int()
    assert (levels - tensors["image_uint8"].int()).abs().max() <= TOLERANCE["image_uint8_max_abs"]


@pytest.mark.parametrize("name", GOLDEN.case_names)
def test_golden_bagel(name, model, processors, monkeypatch):
    case, tensors = GOLDEN.case(name)
    processor = processors[case["kind"]]
    if case["kind"] == "train":
        check_training(model, processor, case, tensors)
    elif case["hyper"].get("understanding_output"):
        check_text_generation(model, processor, case, tensors)
    else:
        check_image_generation(model, processor, case, tensors, monkeypatch)


@pytest.mark.parametrize("name", GOLDEN.info.get("transform_sizes", {}))
def test_golden_bagel_sizes(name):
    rule = GOLDEN.info["transform_sizes"][name]
    names = {"max_image_size": "max_size", "min_image_size": "min_size", "image_stride": "stride"}
    args = {names.get(key, key): value for key, value in rule["args"].items()}
    if "img_num" in rule:  # images of one sample share the pixel budget
        args["max_pixels"] = args.get("max_pixels", 14 * 14 * 9 * 1024) / rule["img_num"]
    for case in rule["cases"]:
        assert resized_size(*case["input_wh"], **args) == tuple(case["output_wh"]), case
