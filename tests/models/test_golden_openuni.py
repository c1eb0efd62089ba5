"""OpenUni against the reference cases. What each case holds is described in its `description`.

Some of these pad on the other side than training does, so sequences are compared where their mask is one.
"""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file

from reca_trainer.models import openuni
from reca_trainer.models.openuni.modeling_openuni import noise_levels
from tests.conftest import Golden

GOLDEN = Golden("openuni")
TOLERANCE = GOLDEN.info["suggested_tolerance"]["other_implementation"]


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN.folder / "cases.safetensors")


@pytest.fixture(scope="module")
def processor():
    return openuni.read_published_processor(GOLDEN.checkpoint, variant="openuni_finetune.pth")


@pytest.fixture(params=["internvl3", "internvl3-hf"], scope="module")
def load(request):
    """Loads a checkpoint on top of InternVL3 in one of its two layouts."""
    return lambda name: openuni.read_published(
        GOLDEN.checkpoint, variant=name, internvl=GOLDEN.checkpoint / request.param
    )


class Case:
    """One case, and the tensors that a model computes on the way to its result."""

    def __init__(self, name, tensors):
        self.info = GOLDEN.info["cases"][name]
        self.tensors = {key.split("/")[1]: value for key, value in tensors.items() if key.split("/")[0] == name}
        self.seen = set()

    def __getitem__(self, key):
        return self.tensors[key]

    def __contains__(self, key):
        return key in self.tensors

    def check(self, key, value, expected=None, **tolerance):
        expected = self.tensors[key] if expected is None else expected
        self.seen.add(key)
        assert value.shape == expected.shape, key
        if not value.is_floating_point():
            assert torch.equal(value, expected.to(value.dtype)), key
            return
        tolerance = tolerance or TOLERANCE
        torch.testing.assert_close(value.float(), expected, msg=lambda text: f"{key}: {text}", **tolerance)

    def rows(self, key, batch_size):
        """A tensor with a row per sequence. Several samples of one prompt have its row stored once: it is repeated."""
        rows = self.tensors[key]
        return rows.repeat_interleave(batch_size // len(rows), dim=0)

    def images(self):
        """The recorded images after the recorded crops, which the original draws at random along the longer side."""
        offsets = [draw for kind, draw in self.info["random_draws"] if kind == "randint"]
        for index, offset in enumerate(offsets):
            image = Image.fromarray(self[f"raw_image_{index}"].numpy())
            side = min(image.size)
            left, top = (offset, 0) if image.width > image.height else (0, offset)
            yield image.crop((left, top, left + side, top + side))


@pytest.fixture
def record():
    """Keeps the arguments and the output of a module's last call."""
    handles, calls = [], {}

    def watch(name, module):
        def hook(_, args, kwargs, output):
            calls[name] = (kwargs or args, getattr(output, "last_hidden_state", output))

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    yield watch, calls
    for handle in handles:
        handle.remove()


def watch_condition(model, record):
    """Follows a prompt from the language model to SANA."""
    watch, calls = record
    watch("vision", model.internvl.model.vision_tower)
    watch("projector_in", model.internvl.model.multi_modal_projector)
    watch("language", model.internvl.model.language_model)
    watch("connector", model.connector)
    watch("projector", model.projector)
    watch("sana", model.transformer)
    return calls


def check_condition(case, calls, num_queries):
    arguments, hidden = calls["language"]
    mask = arguments["attention_mask"].bool()
    expected = expected_mask(case, num_queries, len(mask))
    case.check("position_ids", arguments["position_ids"][mask], case.rows("position_ids", len(mask))[expected])
    if "llm_last_hidden_state" in case:
        rows = case.rows("llm_last_hidden_state", len(mask))
        case.check("llm_last_hidden_state", hidden[mask], rows[expected])
    if "inputs_embeds" in case:
        rows = case.rows("inputs_embeds", len(mask))
        case.check("inputs_embeds", arguments["inputs_embeds"][mask], rows[expected])
    case.check("query_hidden_states", hidden[:, -num_queries:])
    if "connector_out" in case:
        case.check("connector_out", calls["connector"][1])
    case.check("prompt_embeds", calls["projector"][1])


def expected_mask(case, num_queries, batch_size):
    mask = case.rows("attention_mask", batch_size).bool()
    full = torch.cat([mask, mask.new_ones(len(mask), num_queries)], dim=1)
    if "attention_mask_full" in case:
        case.check("attention_mask_full", full, case.rows("attention_mask_full", batch_size))
    return full


def check_prompt(case, batch, processor):
    """Over-long captions lose the end of their turn in the original and keep it here: that is checked, and the batch
    then gets the original's ids, with which it computed the rest of the case."""
    ids, mask = (case.rows(key, len(batch["input_ids"])) for key in ("input_ids", "attention_mask"))
    rows = [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
    end = processor.tokenizer("<|im_end|>\n<|im_start|>assistant\n<img>")["input_ids"]
    framed = [
        row[: -len(end)] + end if len(row) == processor.max_caption_length and row[-len(end) :] != end else row
        for row in rows
    ]
    seen = batch["attention_mask"].bool()
    assert [row[kept].tolist() for row, kept in zip(batch["input_ids"], seen, strict=True)] == framed
    batch["input_ids"][seen] = ids[mask.bool()].to(batch["input_ids"])
    case.check("input_ids", batch["input_ids"][seen], ids[mask.bool()])
    case.check("attention_mask", seen.sum(1), mask.sum(1))


def check_pixels(case, pixel_values):
    case.check("resized_uint8", pixel_values, 2 * (case["resized_uint8"] / 255) - 1, rtol=0, atol=0)


def check_tokens(case, load, processor, record):
    prompts = case.info["strings"]
    image = Image.new("RGB", (processor.image_size,) * 2)
    instruction = prompts["reconstruct"].split("</img>\n")[1].split("<|im_end|>")[0]
    caption = prompts["generation"].split("Generate an image: ")[1].split("<|im_end|>")[0]
    batches = {
        "generation": processor(text=[caption], task="generate"),
        "cfg": processor(text=[caption], task="generate", dropped=[True]),
        "reconstruct": processor(images=[image], instruction=instruction, task="reconstruct"),
    }
    for name, batch in batches.items():
        case.check(f"{name}_ids", batch["input_ids"][0])
        assert processor.tokenizer.decode(batch["input_ids"][0]) == prompts[name]


def check_schedule(case, load, processor, record):
    model = load("openuni_finetune.pth")
    count = len(case["train_timesteps"])
    timesteps, sigmas = noise_levels((torch.arange(count) + 0.5) / count)
    case.check("train_timesteps", timesteps)
    case.check("train_sigmas", sigmas)
    for steps in (int(key.rsplit("_", 1)[1]) for key in case.tensors if key.startswith("sample_timesteps")):
        scheduler = DPMSolverMultistepScheduler.from_config(model.config.scheduler_config)
        scheduler.set_timesteps(steps)
        case.check(f"sample_timesteps_{steps}", scheduler.timesteps)
        case.check(f"sample_sigmas_{steps}", scheduler.sigmas)


def check_training(case, load, processor, record):
    info = case.info
    model = load(info["weights"])
    model.freeze_understanding()
    model.transformer.requires_grad_(not info["freeze"]["transformer"])
    model.train()
    calls = watch_condition(model, record)
    if "prompt_list" in info:
        instructions = [info["prompt_list"][draw] for kind, draw in info["random_draws"] if kind == "choice"]
        batch = processor(images=list(case.images()), instruction=instructions, task="reconstruct")
        case.check("vit_pixel_values", batch["condition_pixel_values"])
    else:
        draws = [draw for kind, draw in info["random_draws"] if kind == "uniform"]
        captions = info["captions"]
        dropped = [draw < info["unconditional"] for draw in draws]
        if "image_latents_0" in case:
            # Captions are cut whenever they have a target; here that target needs no pixels.
            images = [Image.new("RGB", (processor.image_size,) * 2)] * len(captions)
            batch = processor(images=images, text=captions, task="generate", dropped=dropped)
            del batch["pixel_values"]
            batch["latents"] = torch.stack([case[f"image_latents_{index}"] for index in range(len(captions))])
        else:
            batch = processor(images=list(case.images()), text=captions, task="generate", dropped=dropped)
    check_prompt(case, batch, processor)
    if "pixel_values" in batch:
        check_pixels(case, batch["pixel_values"])

    output = model(**batch, corruption={"noise": case["noise"], "u": case["u"]})
    check_condition(case, calls, model.config.num_queries)
    if "visual_embeds" in case:
        case.check("vit_last_hidden_state", calls["vision"][1])
        case.check("pixel_shuffled", calls["projector_in"][0][0])
        case.check("visual_embeds", output.understanding_embeds)
    sana = calls["sana"][0]
    case.check("timesteps", sana["timestep"])
    case.check("noisy_latents", sana["hidden_states"])
    case.check("sigmas", noise_levels(case["u"])[1].view(-1, 1, 1, 1))
    case.check("latents", case["noise"] - output.target)
    case.check("model_pred", output.prediction)
    case.check("target", output.target)
    case.check("loss", output.loss.detach())
    torch.testing.assert_close(output.per_sample_loss.mean(), output.loss.detach())
    assert model.count_supervised(batch, {"noise": case["noise"]}) == case["noise"].numel()

    output.loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert set(gradients) == set(info["trainable_parameters"])
    gradients = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    assert set(info["trainable_parameters"]) - set(gradients) == set(info["trainable_without_grad"])
    for name, norm in info["grad_norms"].items():
        # In exact arithmetic the gradients of key biases are zero; what is recorded for them is round-off.
        assert gradients[name].norm().item() == pytest.approx(norm, rel=5e-3, abs=1e-6), name
    for key in case.tensors:
        if key.startswith("grad."):
            case.check(key, gradients[key.removeprefix("grad.")])
    total = torch.stack([value.norm() for value in gradients.values()]).norm().item()
    assert total == pytest.approx(info["scalars"]["total_grad_norm"], rel=TOLERANCE["rtol"])


def check_sampling(case, load, processor, record):
    info = case.info
    model = load(info["weights"]).eval()
    calls = watch_condition(model, record)
    if "raw_image" in case:
        # The original stretches the picture to the output's size; with that done, the crop has nothing to cut off.
        raw = Image.fromarray(case["raw_image"].numpy())
        image = raw.resize((info["height"], info["width"]))
        text, task = [info["prompt"], info["cfg_prompt"]], "reconstruct"
        texts = [prompt for prompt in text for _ in range(info["samples"])]
        batch = processor(images=[image] * len(texts), instruction=texts, task=task, size=image.size[::-1])
        check_pixels(case, batch["pixel_values"][: len(case["resized_uint8"])])
        visual_embeds = model.encode_condition(batch["condition_pixel_values"])
        case.check("visual_embeds", visual_embeds[: len(case["visual_embeds"])])
    else:
        task = "generate"
        count = len(info["prompts"])
        batch = processor(text=info["prompts"] * 2, task=task, dropped=[False] * count + [True] * count)
        visual_embeds = None
    check_prompt(case, batch, processor)
    with torch.no_grad():
        prompt_embeds = model.encode_prompt(batch["input_ids"], batch["attention_mask"], visual_embeds)
    check_condition(case, calls, model.config.num_queries)

    noise, scale, steps = case["initial_noise"], info["cfg_scale"], info["num_steps"]
    trace = []
    final = model.sample_latents(
        noise,
        prompt_embeds if scale > 1 else prompt_embeds[: len(noise)],
        steps,
        scale,
        on_step=lambda timestep, latents: trace.append((timestep, latents)),
    )
    case.check("timesteps", torch.stack([timestep for timestep, _ in trace]))
    case.check("step_latents", torch.stack([latents for _, latents in trace]))
    case.check("final_latents", final)
    case.check("image", model.decode_target(final))

    if task == "generate":
        images = model.generate_images(
            processor,
            text=info["prompts"],
            num_inference_steps=steps,
            guidance_scale=scale,
            height=info["height"],
            width=info["width"],
            latents=noise,
        )
        levels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
        expected = case["image_uint8"] if "image_uint8" in case else (127.5 * case["image"] + 128).clamp(0, 255).byte()
        case.seen.add("image_uint8")
        assert (levels.int() - expected.int()).abs().max() <= 1  # a rounding boundary may fall between the two
        assert (levels != expected).float().mean() < 1e-3


def dispatch(case):
    checks = {
        "strings": check_tokens,
        "train_shift": check_schedule,
        "trainable_parameters": check_training,
        "num_steps": check_sampling,
    }
    check = next((check for content, check in checks.items() if content in case.info), None)
    assert check is not None, f"no check for a case of {', '.join(case.info)}"
    return check


@pytest.mark.parametrize("name", GOLDEN.case_names)
def test_golden_openuni(name, tensors, load, processor, record):
    case = Case(name, tensors)
    dispatch(case)(case, load, processor, record)
    inputs = {key for key in case.tensors if key in case.info["inputs"]}
    assert set(case.tensors) - inputs - case.seen == set(), "outputs that were not compared"
