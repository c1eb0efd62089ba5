"""Harmon against the reference cases, one test per case."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from reca_trainer.models import harmon
from reca_trainer.models.common.pixels import to_pixels
from reca_trainer.models.contract import IMAGE_MARK, conversations_of
from reca_trainer.models.harmon.mar_harmon import GaussianDiffusion, Visible, hidden_counts, mask_rate
from reca_trainer.models.harmon.modeling_harmon import positions
from reca_trainer.models.harmon.processing_harmon import IMAGE_POSITION
from tests.conftest import Golden

golden = Golden("harmon")


@pytest.fixture(scope="module")
def model():
    return harmon.read_published(golden.checkpoint)


@pytest.fixture(scope="module")
def processor():
    return harmon.read_published_processor(golden.checkpoint)


@pytest.fixture
def check(record_property):
    """Compare with a reference and record the largest deviation."""

    def check(name, value, expected, atol=5e-5, rtol=2e-5):
        value, expected = torch.as_tensor(value).detach().double(), torch.as_tensor(expected).double()
        assert value.shape == expected.shape, f"{name}: {tuple(value.shape)}, expected {tuple(expected.shape)}"
        record_property(name, float((value - expected).abs().max()))
        torch.testing.assert_close(value, expected, atol=atol, rtol=rtol, msg=lambda text: f"{name}: {text}")

    return check


def pixels(images):
    """`[B, 3, H, W]` in [-1, 1] from uint8 `[B, H, W, 3]`."""
    return to_pixels([Image.fromarray(image.numpy()) for image in images])


def corruption(model, tensors):
    """The family's draws from the reference's orders, rate and tiled rows."""
    orders, copies = tensors["orders"], model.config.mar_config.diffusion_batch_mul
    batch_size, length = orders.shape
    mask = torch.zeros(batch_size, length, dtype=torch.bool)
    mask.scatter_(1, orders[:, : int(np.ceil(length * float(tensors["mask_rate"])))], True)
    return {
        "mask": mask,
        "timesteps": tensors["t"].view(copies, batch_size, length).transpose(0, 1),
        "noise": tensors["noise"].view(copies, batch_size, length, -1).transpose(0, 1),
    }


def check_gradients(check, model, tensors, norms):
    gradients = {name: p.grad for name, p in model.named_parameters()}
    expected = {name: norm for name, norm in norms.items() if norm is not None}
    assert {name for name, grad in gradients.items() if grad is not None} == set(expected)
    measured = [float(gradients[name].norm()) for name in expected]
    check("gradient norms", measured, list(expected.values()), atol=1e-6, rtol=7e-5)
    for name, norm in expected.items():
        assert norm > 0 or not gradients[name].any(), name
    for name, value in tensors.items():
        if name.startswith("grad."):
            check(name, gradients[name.removeprefix("grad.")], value)


def backward(model, **inputs):
    model.zero_grad()
    model.freeze_understanding()
    output = model(**inputs)
    output.loss.backward()
    return output


def preprocess(info, tensors, model, processor, check):
    size = info["scalars"]["image_size"]
    processor = harmon.Processor(processor.tokenizer, image_size=size)
    for index in range(len(info["inputs"])):
        image = Image.fromarray(tensors[f"raw{index}"].numpy())
        free = max(image.size) - min(image.size)
        place = (info["scalars"][f"crop_offset{index}"] + 0.5) / (free + 1)
        generate = processor(images=[image], text=["a"], task="generate", crop=[place])["pixel_values"][0]
        reconstruct = processor(images=[image], instruction="", task="reconstruct")["pixel_values"][0]
        caption = processor(images=[image], text=["a"], instruction="b", task="caption")["condition_pixel_values"][0]
        check(f"recon{index}", reconstruct, tensors[f"recon_pixel_values{index}"], atol=1e-6)
        check(f"t2i_crop{index}", generate, tensors[f"t2i_crop_pixel_values{index}"], atol=1e-6)
        check(f"und{index}", caption, tensors[f"und_pixel_values{index}"], atol=1e-6)


def prompts(info, tensors, model, processor, check):
    for example in info["scalars"]["examples"]:
        kind = example["kind"].removesuffix("_unconditional")
        if kind == "image2text":
            turns = conversations_of(example["answers"], example["question"], with_images=False)
            messages = [message for turn in turns for message in turn]
            messages[0]["content"] = f"{IMAGE_MARK}\n{example['question']}"
            assert processor.conversation(messages) == (example["input_ids"], example["labels"])
        else:
            task = {"recon": "reconstruct", "text2image": "generate"}[kind]
            prompt, dropped = example["prompt"] or "", example["prompt"] is None
            assert processor.prompt_ids([prompt], task, [dropped]) == [example["input_ids"]]


def vae(info, tensors, model, processor, check):
    image = pixels(tensors["image"])
    with torch.no_grad():
        posterior = model.vae.encode(image).latent_dist
    check("mean", posterior.mean, tensors["mean"], atol=1e-4)
    check("logvar", posterior.logvar, tensors["logvar"])
    check("latents", model.encode_target(image), tensors["latents"])
    check("decoded", model.decode_target(tensors["latents"]), tensors["decoded"])


def diffusion_tables(info, tensors, model, processor, check):
    for name in info["expected"]:
        spacing, table = re.fullmatch(r"(train|respaced_[^_]+)_(.+)", name).groups()
        diffusion = GaussianDiffusion(None if spacing == "train" else spacing.removeprefix("respaced_"))
        check(name, getattr(diffusion, table), tensors[name], atol=0, rtol=1e-9)


def diffloss(info, tensors, model, processor, check):
    head, t = model.mar.diffloss, tensors["t"]
    with torch.no_grad():
        x_t = head.training_diffusion.add_noise(tensors["target"], tensors["noise"], t)
        output = head.net(x_t, t, tensors["z"])
        mse, vb = head.training_diffusion.losses(output, tensors["target"], x_t, tensors["noise"], t)
        loss, _ = head(tensors["z"], tensors["target"], t, tensors["noise"])
    check("x_t", x_t, tensors["x_t"])
    check("model_output", output, tensors["model_output"])
    check("mse", mse, tensors["mse"])
    check("vb", vb, tensors["vb"])
    check("loss", loss, tensors["loss"])
    check("masked_loss", (loss * tensors["mask"]).sum() / tensors["mask"].sum(), info["scalars"]["masked_loss"])


def diffloss_sample(info, tensors, model, processor, check):
    rows, scalars = len(tensors["init_noise"]), info["scalars"]
    noise = torch.cat([tensors["init_noise"][:, None], tensors["step_noise"][:, :rows].transpose(0, 1)], dim=1)
    diffusion = GaussianDiffusion(scalars["num_sampling_steps"])
    with torch.no_grad():
        sample = model.mar.diffloss.sample(tensors["z"], noise, scalars["cfg"], scalars["temperature"], diffusion)
    want = tensors["sample"][:rows]
    check("sample (relative)", sample / want.abs().max(), want / want.abs().max())


def mask_rates(info, tensors, model, processor, check):
    rates = mask_rate(tensors["quantiles"])
    check("mask_rate", rates, tensors["mask_rate"], atol=1e-12, rtol=0)
    length = info["scalars"]["seq_len"]
    assert torch.equal((length * rates).ceil().long(), tensors[f"num_masked_L{length}"])
    for iterations, hidden in info["scalars"][f"masked_after_each_iter_L{length}"].items():
        # the reference calls the last token hidden until the loop ends
        assert [max(1, count) for count in hidden_counts(length, int(iterations))] == hidden


def visual_features(info, tensors, model, processor, check):
    latents, mask = tensors["latents"], tensors["mask"].bool()
    native, buffers, grid = model.mar.native_grid, model.mar.buffer_size, tuple(latents.shape[1:3])
    with torch.no_grad():
        for name, part in (("interp", latents), ("native", latents[:, :native, :native])):
            table = model.mar.position_embeddings(model.mar.encoder_pos_embed_learned, tuple(part.shape[1:3]))
            check(f"{name}_encoder_pos_embed", table, tensors[f"{name}_encoder_pos_embed"])
            check(f"{name}_x_enc", model.mar.encode(part), tensors[f"{name}_x_enc"])
            check(f"{name}_z_enc", model.understand(part), tensors[f"{name}_z_enc"])
        visible = Visible.of(mask)
        encoded = model.mar.encode(latents, visible)
        check("masked_z_enc", model.proj_in(encoded).roll(-buffers, 1), tensors["masked_z_enc"])
        check("masked_decoder_out", model.mar.decode(encoded, visible, grid), tensors["masked_decoder_out"])


def check_scaled_gradients(check, model, inputs, info, tensors):
    """At each of the recorded scales; single gradients were recorded at the first, the official one."""
    prefix, scale = "grad_norms_grad_scale_", model.config.understanding_grad_scale
    values = [name.removeprefix(prefix) for name in info["scalars"] if name.startswith(prefix)]
    official = str(info["scalars"].get("grad_scale", values[0]))
    assert official in values
    try:
        for value in values:
            model.config.understanding_grad_scale = 1.0 if value == "None" else float(value)
            backward(model, **inputs)
            exact = tensors if value == official else {}
            check_gradients(check, model, exact, info["scalars"][prefix + value])
    finally:
        model.config.understanding_grad_scale = scale


def images_of(info, tensors):
    """A case's training images, which may be stored with another case."""
    if "images" in tensors:
        return tensors["images"]
    other, name = re.fullmatch(r"same tensor as (\w+)\.(\w+)", info["scalars"]["images"]).groups()
    return golden.case(other)[1][name]


def recon_loss(info, tensors, model, processor, check):
    inputs = {
        "task": "reconstruct",
        "pixel_values": pixels(tensors["images"]),
        "input_ids": tensors["input_ids"],
        "attention_mask": tensors["attention_mask"].long(),
        "corruption": corruption(model, tensors),
    }
    mask = inputs["corruption"]["mask"]
    output = backward(model, **inputs)
    check("loss", output.loss, info["scalars"]["loss"], atol=2e-6, rtol=1e-6)
    weighted = (output.per_sample_loss * mask.sum(1)).sum() / mask.sum()
    check("per_sample_loss", weighted, info["scalars"]["loss"], atol=2e-6, rtol=1e-6)
    check("z_enc", output.understanding_embeds, tensors["z_enc"])
    assert torch.equal(mask, tensors["mask"].bool())
    assert model.count_supervised(inputs, inputs["corruption"]) == int(tensors["num_masked"]) * len(mask)
    check_scaled_gradients(check, model, inputs, info, tensors)

    with torch.no_grad():
        latents = model.encode_target(inputs["pixel_values"])
        check("latents", latents, tensors["latents"])
        context, context_mask, _ = model._embed(
            inputs["input_ids"], inputs["attention_mask"], model.understand(latents)
        )
        visible = Visible.of(mask)
        encoded = model.mar.encode(latents, visible)
        check("masked_x_enc", encoded, tensors["masked_x_enc"])
        check("fused_x_enc", model._fuse(encoded, visible, context_mask, context), tensors["fused_x_enc"])
        z = model._predict(latents, visible, context, context_mask)
        check("decoder_z", z, tensors["decoder_z"])
        x0, draws, diffusion = latents.flatten(1, 2)[:, None], inputs["corruption"], GaussianDiffusion()
        x_t = diffusion.add_noise(x0, draws["noise"], draws["timesteps"])
        prediction = model.mar.diffloss.net(x_t, draws["timesteps"], z[:, None])
        mse, vb = diffusion.losses(prediction, x0, x_t, draws["noise"], draws["timesteps"])
        check("mse", mse.transpose(0, 1).flatten(), tensors["mse"])
        check("vb", vb.transpose(0, 1).flatten(), tensors["vb"], atol=2e-4)


def caption_inputs(tensors, images):
    return {
        "task": "caption",
        "condition_pixel_values": pixels(images),
        "input_ids": tensors["input_ids"],
        "attention_mask": tensors["attention_mask"].long(),
        "labels": tensors["labels"],
    }


def image2text_loss(info, tensors, model, processor, check):
    inputs = caption_inputs(tensors, images_of(info, tensors))
    output = backward(model, **inputs)
    check("loss", output.loss, info["scalars"]["loss"], atol=5e-6, rtol=1e-6)
    assert model.count_supervised(inputs, {}) == info["scalars"]["num_supervised"] == len(output.prediction)
    check_scaled_gradients(check, model, inputs, info, tensors)


def text2image_loss(info, tensors, model, processor, check):
    draws = corruption(model, tensors)
    assert torch.equal(draws["mask"], tensors["mask"].bool())
    images = pixels(images_of(info, tensors))
    text = {"input_ids": tensors["input_ids"], "attention_mask": tensors["attention_mask"].long()}
    output = backward(model, task="generate", pixel_values=images, corruption=draws, **text)
    check("loss", output.loss, info["scalars"]["loss"], atol=2e-6, rtol=1e-6)
    check_gradients(check, model, tensors, info["scalars"]["grad_norms"])
    with torch.no_grad():
        visible = Visible.of(draws["mask"])
        context, context_mask, _ = model._embed(**text, image_embeds=None)
        encoded = model.mar.encode(model.encode_target(images), visible)
        check("fused_x_enc", model._fuse(encoded, visible, context_mask, context), tensors["fused_x_enc"])


def train_step(info, tensors, model, processor, check):
    scalars = info["scalars"]
    model = harmon.read_published(golden.checkpoint)
    model.freeze_understanding()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(parameters) <= set(scalars["decay"] + scalars["no_decay"])
    before = {name: p.detach().clone() for name, p in parameters.items()}
    groups = [([p for name, p in parameters.items() if name in scalars[group]], decay)
              for group, decay in (("decay", scalars["weight_decay"]), ("no_decay", 0.0))]  # fmt: skip
    optimizer = torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in groups],
        lr=scalars["lr"],
        betas=scalars["betas"],
        eps=scalars["eps"],
    )

    recon = golden.case("recon_loss")[1]
    text = {"input_ids": recon["input_ids"], "attention_mask": recon["attention_mask"].long()}
    reconstruct = {"task": "reconstruct", "pixel_values": pixels(recon["images"]), **text}
    caption = caption_inputs(golden.case("image2text_loss")[1], recon["images"])
    losses = []
    for name in scalars["micro_batches"]:
        if not name.startswith("image2text") and "same" not in name:
            current, key = {**reconstruct, "corruption": corruption(model, recon)}, "pixel_values"
        elif name.startswith("image2text") and "same" not in name:
            current, key = caption, "condition_pixel_values"
        flipped = {**current, key: current[key].flip(-1)} if "flipped" in name else current
        loss = model(**flipped).loss
        (loss / len(scalars["micro_batches"])).backward()
        losses.append(loss)
    check("losses", torch.stack(losses), scalars["losses"], atol=5e-6, rtol=1e-6)
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), scalars["max_norm"])
    check("grad_norm", norm / scalars["grad_norm_before_clip"], 1.0)
    optimizer.step()

    ratios = []
    for name, (update_norm, update_sum) in scalars["update_norm_and_sum"].items():
        if name in parameters and update_norm > 0 and not re.search(r"^mar\..*attn\.qkv\.bias$", name):
            update = parameters[name].detach() - before[name]
            ratios.append(float(update.norm()) / update_norm)
            check(f"sum of {name}", update.sum(), update_sum, atol=5e-3, rtol=0)
        elif name not in parameters:
            assert update_norm == 0, name
    check("update norms (relative)", ratios, torch.ones(len(ratios)), atol=5e-4)
    for name, value in tensors.items():
        check(name, parameters[name.removeprefix("after.")], value)


def sample(info, tensors, model, check, context, context_mask):
    """Sample with the reference's draws: noise given iteration by iteration is put at the tokens it is for."""
    scalars, image = info["scalars"], tensors["image"]
    grid = tuple(side // model.config.mar_config.vae_stride for side in image.shape[-2:])
    length, copies = grid[0] * grid[1], 1 if scalars["cfg"] == 1 else 2
    order = tensors["orders"][: len(context) // copies]
    steps = len(tensors["iter0.step_noise"])
    assert steps == len(model.mar.diffloss.sampling_diffusion.timestep_map)
    rows, hidden, chosen = torch.arange(len(order))[:, None], length, []
    noise = torch.zeros(*order.shape, 1 + steps, tensors["iter0.init_noise"].shape[-1])
    for iteration, remaining in enumerate(hidden_counts(length, scalars["num_iter"])):
        chosen.append(order[:, remaining:hidden].sort(1).values)
        count = chosen[-1].numel()
        start, step = tensors[f"iter{iteration}.init_noise"], tensors[f"iter{iteration}.step_noise"]
        draws = torch.cat([start[:count, None], step[:, :count].transpose(0, 1)], dim=1)
        noise[rows, chosen[-1]] = draws.unflatten(0, chosen[-1].shape)
        hidden = remaining

    conditions = []
    hook = model.mar.diffloss.net.cond_embed.register_forward_pre_hook(lambda _, args: conditions.append(args[0]))
    with torch.no_grad():
        latents = model.sample_latents(
            context, context_mask, order, noise, grid, scalars["num_iter"], scalars["cfg"],
            scalars.get("cfg_schedule", "constant"), scalars["temperature"],
        )  # fmt: skip
        decoded = model.decode_target(latents)
    hook.remove()
    flat = latents.flatten(1, 2)
    for iteration, index in enumerate(chosen):
        want = tensors[f"iter{iteration}.sampled"][: index.numel()]
        check(f"iter{iteration}.sampled", flat[rows, index].flatten(0, 1), want, atol=1e-4)
        if f"iter{iteration}.decoder_z" in tensors:
            z = tensors[f"iter{iteration}.decoder_z"][: copies * len(order)]
            z = z.unflatten(0, (copies, len(order)))[:, rows, index]
            check(f"iter{iteration}.decoder_z", conditions[iteration * steps], z.flatten(0, 2), atol=1e-4)
    check("tokens", latents, tensors["tokens"][: len(order)], atol=1e-4)
    check("image", decoded, image[: len(order)], atol=2e-4)


def sample_t2i(info, tensors, model, processor, check):
    ids, mask = tensors["input_ids"], tensors["attention_mask"].long()
    prompt = info["scalars"]["prompt"].removeprefix("Generate an image: ")
    conditional = processor.prompt_ids([prompt], "generate")[0]
    assert ids[0][mask[0].bool()].tolist() == conditional
    if info["scalars"]["cfg"] != 1:
        assert ids[-1][mask[-1].bool()].tolist() == processor.prompt_ids([""], "generate", [True])[0]
    with torch.no_grad():
        context, context_mask, _ = model._embed(ids, mask, None)
    sample(info, tensors, model, check, context, context_mask)


def sample_recon(info, tensors, model, processor, check):
    scalars, place = info["scalars"], info["scalars"]["image_insert_position"]
    assert place == IMAGE_POSITION
    assert processor.prompt_ids([""], "generate", [True])[0] == scalars["uncond_input_ids"]
    ids = scalars["cond_input_ids"]
    prompts = torch.tensor([[*ids[:place], model.config.image_token_id, *ids[place:]]])
    with torch.no_grad():
        understanding = model.encode_condition(pixels(tensors["images"]))
        check("cond_z_enc", understanding, tensors["cond_z_enc"])
        context, mask, _ = model._embed(prompts.expand(len(understanding), -1), None, understanding)
        unconditional = torch.full(mask.shape, scalars["uncond_pad_token_id"])
        unconditional[:, : len(scalars["uncond_input_ids"])] = torch.tensor(scalars["uncond_input_ids"])
        kept = torch.arange(mask.shape[1]) < len(scalars["uncond_input_ids"])
        if scalars["cfg"] != 1:
            context = torch.cat([context, model._embed(unconditional, None, None)[0]])
            mask = torch.cat([mask, kept.long().expand_as(mask)])
    sample(info, tensors, model, check, context, mask)


def image2text_generate(info, tensors, model, processor, check):
    scalars = info["scalars"]
    prompt = processor.question_ids([scalars["question"]], with_image=True)
    ids = torch.tensor(prompt)
    repeats = torch.where(ids[0] == processor.image_token_id, scalars["num_image_tokens"], 1)
    assert torch.equal(ids.repeat_interleave(repeats, dim=1), tensors["prompt_ids"])
    with torch.no_grad():
        understanding = model.encode_condition(pixels(tensors["images"]))
        embeds, mask, _ = model._embed(ids, None, understanding)
        limit = {"max_new_tokens": scalars["max_new_tokens"], "do_sample": False, "pad_token_id": processor.end_id}
        for name, penalty in (("tokens", 1.0), ("tokens_repetition_penalty_1.1", 1.1)):
            output = model.llm.generate(
                inputs_embeds=embeds, attention_mask=mask, repetition_penalty=penalty, **limit,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            assert torch.equal(output.sequences, tensors[name])
            if penalty == 1.0:
                check("logits", torch.cat(output.logits), tensors["logits"], atol=2e-4)
    assert torch.equal(positions(mask)[0], torch.arange(mask.shape[1]))


KINDS = {kind.__name__: kind for kind in (
    preprocess, prompts, vae, diffusion_tables, diffloss, diffloss_sample, mask_rates, visual_features, recon_loss,
    image2text_loss, text2image_loss, train_step, sample_t2i, sample_recon, image2text_generate,
)}  # fmt: skip


@pytest.mark.parametrize("name", golden.case_names)
def test_golden_harmon(name, model, processor, check):
    info, tensors = golden.case(name)
    kind = info.get("kind") or max((kind for kind in KINDS if name.startswith(kind)), key=len, default=name)
    KINDS[kind](info, tensors, model, processor, check)
