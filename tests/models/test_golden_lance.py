"""Lance against the outputs of the original implementation, one test per case.

A training case packs several samples into one sequence; samples never see each other, so each is a batch of its own here,
made by the processor and given the case's draws.
"""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from reca_trainer.models.auto import AutoUnifiedModel, AutoUnifiedProcessor
from reca_trainer.models.common.flow_matching import shift_timesteps
from reca_trainer.models.lance import generation_lance
from reca_trainer.models.lance.modeling_lance import image_patches
from reca_trainer.models.lance.processing_lance import ASPECT_RATIOS, SYSTEM_PROMPTS, bucket, bucket_size, fill
from tests.conftest import Golden

GOLDEN = Golden("lance")
TOLERANCE = GOLDEN.info["suggested_tolerance"]
RULES = GOLDEN.info["transforms"]


@pytest.fixture(scope="module")
def model():
    return AutoUnifiedModel.from_pretrained(GOLDEN.checkpoint).eval()


def make_processor(system):
    """With the resolutions of the cases, and one system prompt for all uses."""
    generation, understanding = (RULES[f"vit_{use}"]["resolution"] for use in ("generation", "understanding"))
    return AutoUnifiedProcessor.from_pretrained(
        GOLDEN.checkpoint,
        resolution=RULES["vae"]["resolution"],
        understanding_resolutions={
            "reconstruct": generation,
            "edit": generation,
            "caption": understanding,
            "answer": understanding,
        },
        system_prompts=dict.fromkeys(("reconstruct", "edit", "generate", "sample", "caption", "question"), system),
    )


def close(actual, expected):
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=TOLERANCE["float32_tensors_atol"], rtol=0)


def image(tensors, index):
    return Image.fromarray(tensors[f"raw_image_{index}"].numpy())


class Sequence:
    """What the model reads of one sample, in the order of the sequence: positions, and states behind the last norm."""

    def __init__(self, model, monkeypatch):
        self.model, self.splits = model, []
        self.run = model._run
        monkeypatch.setattr(model, "_run", self.record)

    def record(self, understanding, generation, position_ids, *args):
        result = self.run(understanding, generation, position_ids, *args)
        decoder = self.model.language_model.model
        states = [decoder.norm(result[0])]
        if result[1] is not None:
            states.append(decoder.norm_moe_gen(result[1]))
        self.splits.append((position_ids.expand(3, 1, -1)[:, 0], torch.cat(states, dim=1)[0].detach()))
        return result

    def check(self, positions, states=None, image=None):
        """Compare with the first tokens of a sample, and forget them.

        Args:
            image: length and place of the image of a caption, all of which is one split, the image first.
        """
        read = [self.in_order(*split, image) for split in self.splits]
        ids, hidden = torch.cat([part[0] for part in read], dim=1), torch.cat([part[1] for part in read])
        assert torch.equal(ids, positions[:, : len(hidden)])
        if states is not None:
            close(hidden, states[: len(hidden)])
        self.splits.clear()
        return len(hidden)

    def in_order(self, ids, hidden, image):
        """A split as it is in the sequence; in memory an image's markers come first."""
        order = list(range(len(hidden)))
        if image is not None:
            length, place = image
            text = order[length:]
            order = [*text[:place], 0, *order[2:length], 1, *text[place:]]
        elif not self.is_text(ids):
            order = [0, *order[2:], 1]
        return ids[:, order], hidden[order]

    @staticmethod
    def is_text(ids):
        return bool((ids[0] == ids[1]).all() and (ids[0].diff() == 1).all())


class Pack:
    """Walks through a training case sample by sample, handing out its packed draws in order."""

    def __init__(self, model, case, tensors, sequence):
        self.model, self.case, self.tensors, self.sequence = model, case, tensors, sequence
        self.latents = self.latent_tokens = self.vit_tokens = self.tokens = 0
        self.squared_errors, self.token_losses = [], []

    def run(self):
        for sample, length in zip(self.case["samples"], self.case["sample_lens"], strict=True):
            self.sample(sample, slice(self.tokens, self.tokens + length))
            self.tokens += length
        losses = {}
        if self.squared_errors:
            losses["loss_mse"] = torch.cat(self.squared_errors).mean()
        if self.token_losses:
            losses["loss_ce"] = torch.cat(self.token_losses).mean()
        return losses

    def sample(self, sample, tokens):
        processor = make_processor(sample["system"])
        text = "" if "text" in sample["dropped"] else sample["text"]
        images = {
            name: image(self.tensors, sample[f"{name}_image"])
            for name in ("condition", "target")
            if f"{name}_image" in sample
        }
        if "answer" in sample:
            contents = (("system", sample["system"]), ("user", f"<image>\n{text}"), ("assistant", sample["answer"]))
            conversation = [{"role": role, "content": content} for role, content in contents]
            batch = processor(images=[images["condition"]], text=[conversation], task="caption")
        elif sample["task"] == "edit":
            batch = processor(images=[(images["condition"], images["target"])], text=[text], task="edit")
            if "vision" in sample["dropped"]:
                del batch["source_pixel_values"], batch["condition_pixel_values"]
        elif sample["task"] == "reconstruct":
            batch = processor(images=[images["target"]], instruction=text, task="reconstruct")
            if sample["condition_image"] != sample["target_image"]:
                batch["condition_pixel_values"] = processor.to_conditions([images["condition"]], "reconstruct")
        else:
            batch = processor(images=[images["target"]], text=[text], task="generate")
        corruption = self.draws(batch)
        output = self.model(**batch, corruption=corruption)
        if output.understanding_embeds is not None:
            end = self.vit_tokens + output.understanding_embeds.shape[1]
            close(output.understanding_embeds[0], self.tensors["vit_out"][self.vit_tokens : end])
            self.vit_tokens = end
        self.compare(batch, output)
        states, shown = self.tensors.get("last_hidden_state"), None
        if "labels" in batch and output.understanding_embeds is not None:
            shown = output.understanding_embeds.shape[1] + 2, int(batch["image_position"][0])
        positions = self.tensors["packed_position_ids"][:, tokens]
        length = self.sequence.check(positions, None if states is None else states[tokens], shown)
        # The end of the turn behind a target influences nothing and is not read.
        assert positions.shape[1] - length == (0 if "labels" in batch else 1)

    def draws(self, batch):
        """The corruption of a batch, after checking our own encoder against the case's latents."""
        if batch["task"] == "caption":
            return {}
        corruption = {}
        for pixels, noise in (("source_pixel_values", "source_posterior_noise"), ("pixel_values", "posterior_noise")):
            if pixels not in batch:
                continue
            corruption[noise] = self.tensors[f"vae_sample_noise_{self.latents}"][None]
            latent = self.tensors[f"latent_{self.latents}"]
            close(self.model.encode_target(batch[pixels], corruption[noise])[0], latent.permute(2, 0, 1))
            posterior = self.model.encode_posterior(batch[pixels])[0]
            if (mean := self.tensors.get(f"vae_mean_{self.latents}")) is not None:
                close(posterior[0], mean)
                close(2 * posterior[1].log(), self.tensors[f"vae_log_var_{self.latents}"])
            if (stored := self.tensors.get(f"vae_pixels_{self.latents}")) is not None:
                close(batch[pixels][0], stored)
            self.latents += 1
            count = latent.shape[0] * latent.shape[1]
            start, self.latent_tokens = self.latent_tokens, self.latent_tokens + count
        place = slice(start, self.latent_tokens)
        timesteps = shift_timesteps(self.tensors["packed_timesteps"][place][:1].sigmoid(), self.case["timestep_shift"])
        close(timesteps, self.tensors["timesteps_shifted"][place][:1])
        return {**corruption, "noise": self.tensors["flow_noise"][None, place], "timesteps": timesteps}

    def compare(self, batch, output):
        if "labels" in batch:
            start = sum(map(len, self.token_losses))
            losses = F.cross_entropy(output.prediction, output.target, reduction="none")
            place = slice(start, start + len(losses))
            assert torch.equal(output.target, self.tensors["packed_label_ids"][place])
            close(losses, self.tensors["ce_per_token"][place])
            if not start and "ce_logits_first4" in self.tensors:
                first = self.tensors["ce_logits_first4"][:, : self.model.config.tokenizer_length]
                close(output.prediction[:4], first[: len(output.prediction)])
            self.token_losses.append(losses)
        else:
            start = sum(map(len, self.squared_errors))
            errors = (output.prediction - output.target).square().mean(-1)[0]
            place = slice(start, start + len(errors))
            close(output.prediction[0], self.tensors["velocity_pred"][place])
            close(errors, self.tensors["mse_per_token"][place])
            self.squared_errors.append(errors)


def freeze(model, freezing):
    """As the original's options do: by default embeddings, head and image encoder, all of understanding with
    `freeze_und`."""
    model.requires_grad_(True)
    for name in ("language_model.model.embed_tokens", "language_model.lm_head", "vit_model"):
        model.get_submodule(name).requires_grad_(False)
    if freezing == "freeze_und":
        model.freeze_understanding()


def check_training(model, case, tensors, monkeypatch):
    freezings = [name.removeprefix("grad_norms_") for name in case if name.startswith("grad_norms_")] or [
        "sft_default"
    ]
    weights = {"loss_mse": case["mse_weight"], "loss_ce": case["ce_weight"]}
    sequence = Sequence(model, monkeypatch)
    for freezing in freezings:
        model.zero_grad(set_to_none=True)
        freeze(model, freezing)
        losses = Pack(model, case, tensors, sequence).run()
        total = sum(weights[name] * loss for name, loss in losses.items())
        for name, value in {**losses, "loss": total}.items():
            assert value.item() == pytest.approx(case["expected"][name], rel=TOLERANCE["losses_rtol"])
        if not total.requires_grad:
            continue
        total.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert not any(name.startswith(("vae.", "vit_model.")) for name in gradients)
        norms = case.get(f"grad_norms_{freezing}", {})
        if freezing == "freeze_und_params":
            # Nothing is detached, and only what the understanding expert itself would learn is left out: the gradients of
            # all others are those without that option.
            gradients = {name: gradient for name, gradient in gradients.items() if norms.get(name) is not None}
        for name, norm in norms.items():
            actual = gradients[name].norm().item() if name in gradients else 0.0
            assert actual == pytest.approx(norm or 0.0, rel=TOLERANCE["grad_norms_rtol"], abs=1e-9), name
        if (norm := case.get(f"grad_norm_total_{freezing}")) is not None:
            squares = sum(gradient.double().square().sum() for gradient in gradients.values())
            assert squares.sqrt().item() == pytest.approx(norm, rel=TOLERANCE["grad_norms_rtol"])


def check_answer(model, case, tensors, monkeypatch):
    assert not case["hyper"]["do_sample"], "only greedy answers can be compared"
    processor = make_processor(case["system"])
    images = [image(tensors, 0)] if "raw_image_0" in tensors else None
    ids, logits, embeds = [], [], []
    output_logits, encode_condition, answer = model.output_logits, model.encode_condition, model._answer
    head = model.language_model.lm_head
    monkeypatch.setattr(model, "output_logits", lambda hidden: logits.append(head(hidden)) or output_logits(hidden))
    monkeypatch.setattr(model, "encode_condition", lambda x: embeds.append(encode_condition(x)) or embeds[-1])
    monkeypatch.setattr(model, "_answer", lambda *args: ids.extend(answer(*args)) or ids)
    sequence = Sequence(model, monkeypatch)
    (text,) = model.generate_text(processor, [case["prompt"]], images, max_new_tokens=case["hyper"]["max_new_tokens"])
    if images is not None:
        close(embeds[0][0], tensors["vit_out"])
    close(torch.cat(logits), tensors["step_logits"])
    expected = case["generated_ids"]
    assert ids[0] == [token for token in expected if token != model.config.eos_token_id]
    assert text == case["text"]
    sequence.check(tensors["position_ids"])


def check_sampling(model, case, tensors, monkeypatch):
    hyper, processor = case["hyper"], make_processor(case["system"])
    images = [image(tensors, 0)] if "raw_image_0" in tensors else None
    task = "generate" if images is None else "edit" if "source_latent" in tensors else "reconstruct"
    calls = {}  # function -> its results, in order
    velocities = []  # by step: those behind each context, and what becomes of them

    def record(owner, name):
        original = getattr(owner, name)

        def recorded(*args):
            calls.setdefault(name, []).append((args, original(*args)))
            return calls[name][-1][1]

        monkeypatch.setattr(owner, name, recorded)

    for name in ("encode_condition", "encode_target", "decode_target", "_denoise"):
        record(model, name)
    record(generation_lance, "unpatchify")
    sequence = Sequence(model, monkeypatch)
    velocity, guide = model.velocity, generation_lance.guide

    def recorded_velocity(context, noisy, timesteps, grid):
        result = velocity(context, noisy, timesteps, grid)
        if not velocities:
            target, texts = sequence.splits[-1], sequence.splits[:-1]
            sequence.splits = [*texts[: 2 + len(images or []) + (task == "edit")], target]
            sequence.check(tensors["position_ids"])
        if not velocities or velocities[-1]["timestep"] != timesteps[0].item():
            velocities.append({"timestep": timesteps[0].item(), "conditional": result[0], "final": result[0]})
        else:
            velocities[-1]["unconditional"] = result[0]
        return result

    def recorded_guide(*args):
        velocities[-1]["final"] = guide(*args)[0]
        return velocities[-1]["final"][None]

    monkeypatch.setattr(model, "velocity", recorded_velocity)
    monkeypatch.setattr(generation_lance, "guide", recorded_guide)
    height, width = case["image_hw"]
    result = model.generate_images(
        processor,
        text=[case["prompt"]],
        images=images,
        task=task,
        height=height,
        width=width,
        num_inference_steps=hyper["num_timesteps"],
        guidance_scale=hyper["cfg_text_scale"],
        guidance_interval=tuple(hyper["cfg_interval"]),
        guidance_renorm=hyper["cfg_renorm_type"],
        guidance_renorm_min=hyper["cfg_renorm_min"],
        use_kv_cache=hyper["use_kv_cache"],
        timestep_shift=hyper["timestep_shift"],
        latents=tensors["init_noise"][None],
        posterior_noise=tensors["vae_sample_noise"][None] if "vae_sample_noise" in tensors else None,
    )
    if "vit_out" in tensors:
        close(calls["encode_condition"][0][1][0], tensors["vit_out"])
    if "source_latent" in tensors:
        close(calls["encode_target"][0][1][0], tensors["source_latent"].permute(2, 0, 1))
    assert [step["timestep"] for step in velocities] == pytest.approx(case["timesteps"])
    assert ["unconditional" in step for step in velocities] == case["guided_steps"]
    close(velocities[0]["conditional"], tensors["first_velocity_conditional"])
    if "first_velocity_unconditional" in tensors:  # also where guidance does not act in the first step
        contexts, noise, grid = calls["_denoise"][0][0][:3]
        with torch.no_grad():
            unconditional = velocity(contexts["no_text"], noise, torch.tensor(case["timesteps"][:1]), grid)
        close(unconditional[0], tensors["first_velocity_unconditional"])
    close(velocities[0]["final"], tensors["first_velocity"])
    close(velocities[-1]["final"], tensors["last_velocity"])
    latent = tensors["final_latent"]
    close(calls["unpatchify"][0][0][0][0], latent.flatten(0, 1))
    if "decoded_image" in tensors:
        close(calls["decode_target"][0][1][0], tensors["decoded_image"])
    if "image_uint8" in tensors:
        levels = torch.from_numpy(np.array(result[0])).int()
        assert (levels - tensors["image_uint8"].int()).abs().max() <= TOLERANCE["image_uint8_max_abs"]
    assert result[0].size == (width, height)


def check_encoders(model, case, tensors):
    processor = make_processor("")
    for index in range(case["images"]):
        raw = image(tensors, index)
        pixels, target = processor.to_conditions([raw], "reconstruct"), processor.to_pixels([raw])
        patches, _ = image_patches(pixels, model.config.vision_config)
        close(patches[:2], tensors[f"vit_patches_first2_{index}"])
        close(model.encode_condition(pixels)[0], tensors[f"vit_embeds_{index}"])
        posterior = model.encode_posterior(target)[0]
        close(posterior[0], tensors[f"vae_mean_{index}"])
        close(2 * posterior[1].log(), tensors[f"vae_log_var_{index}"])
        for name, actual in (("vit_pixels", pixels), ("vae_pixels", target)):
            if (stored := tensors.get(f"{name}_{index}")) is not None:
                close(actual[0], stored)
        if (decoded := tensors.get(f"vae_decoded_mean_{index}")) is not None:
            close(model.decode_target(posterior[None, 0])[0], decoded)


@pytest.mark.parametrize("name", GOLDEN.case_names)
def test_golden_lance(name, model, monkeypatch):
    case, tensors = GOLDEN.case(name)
    if case["kind"] == "train":
        check_training(model, case, tensors, monkeypatch)
    elif case["kind"] == "answer":
        check_answer(model, case, tensors, monkeypatch)
    elif case["kind"] == "sample":
        check_sampling(model, case, tensors, monkeypatch)
    else:
        with torch.no_grad():
            check_encoders(model, case, tensors)


@pytest.mark.parametrize("name", GOLDEN.info.get("transform_sizes", {}))
def test_golden_lance_sizes(name):
    rule = GOLDEN.info["transform_sizes"][name]
    resolution, stride, divisor = (rule["args"][key] for key in ("resolution", "stride", "divisible_crop"))
    buckets = [list(bucket(ratio, resolution, stride)) for ratio in ASPECT_RATIOS]
    assert buckets == rule["buckets_hw"]
    for case in rule["cases"]:
        size = bucket_size(*case["input_wh"], resolution, stride)
        assert list(size) == case["bucket_hw"]
        assert [side // divisor * divisor for side in size] == case["output_hw"]
        part = CroppedOnly(case["input_wh"])
        fill(part, size)
        assert part.box in case["crop_top_left_h_w"], case


class CroppedOnly:
    """A picture of some size without pixels, that remembers what was cut out of it."""

    def __init__(self, size):
        self.width, self.height = size

    def crop(self, box):
        left, top, right, bottom = box
        self.box = [top, left, bottom - top, right - left]
        return self

    def resize(self, *args):
        return self


def test_the_system_prompts_are_those_that_lance_was_trained_with():
    """By the first digits of their digests, as `FACTS.md` of the reference cases has them."""
    digests = {
        use: [
            hashlib.sha256(prompt.encode()).hexdigest()[:16]
            for prompt in ([value] if isinstance(value, str) else value)
        ]
        for use, value in SYSTEM_PROMPTS.items()
    }
    assert digests == {
        "generate": ["9eda36faddf3da24"],
        "sample": ["71a3148219111869"],
        "edit": ["fd17d2bf186ddbfb"],
        "caption": ["920c445bdd35b596", "cbb20f11a4725e6e", "6ee6709ea6ef4e84", "2d7462f470ccfe8c"],
        "question": digests["question"],  # an example's, not the source's
    }
