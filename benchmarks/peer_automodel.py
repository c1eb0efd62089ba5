"""RecA steps of this library and of NVIDIA NeMo Automodel's BAGEL, side by side; prints one JSON line.

    pip install --no-deps -r benchmarks/requirements-peer.txt
    python benchmarks/peer_automodel.py --preset mid --threads 2

Same weights, images, noise, trained parameters and optimiser; the autoencoder's latents are given to both. The losses of
the first three updates must agree. Automodel's attention is written for CUDA in bfloat16; on a CPU
three of its names are bound to float32 equivalents (see `to_cpu`), nothing else is touched.

- `automodel`: as its recipe runs it: dense masks per sample, token routing by gather and scatter.
- `automodel best`: with `mot_grouped=True`, and masks given as `[1, T, T]`, which is what PyTorch's fused CPU kernel
  takes; with `[T, T]` its attention runs unfused.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model

import measure
import presets
import train_step
from reca_trainer.models.bagel import Model
from reca_trainer.models.bagel.modeling_bagel import patchify


def build_automodel(options: dict[str, Any]) -> Callable[[], float]:
    """The same step as `train_step.build`, by Automodel's model."""
    from nemo_automodel.components.models.bagel.model import BagelForUnifiedMultimodal
    from nemo_automodel.components.models.bagel.parallelization import _apply_full_layer_checkpointing

    device = options["device"]
    ours = presets.build_model(options["preset"], train_step.DTYPES[options["dtype"]], device)
    ours.freeze_understanding()
    batch = presets.reconstruction_batch(ours, options["batch_size"], options["resolution"], "latents")
    if device == "cpu":
        to_cpu()
    model = BagelForUnifiedMultimodal(automodel_config(ours), {"mot_grouped": options["best"]})
    model.load_state_dict(
        {f"model.{name}": value for name, value in ours.state_dict().items() if not name.startswith("vae.")},
        strict=False,  # position tables are computed
        assign=True,  # one copy of the weights, as on the other side
    )
    model.to(device, train_step.DTYPES[options["dtype"]]).train()
    trained = {f"model.{name}" for name, parameter in ours.named_parameters() if parameter.requires_grad}
    targets = rf"model\.{Model.lora_target_modules}"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    if options["mode"] == "lora":
        rank = options["lora_rank"]
        model = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    if options["checkpointing"] != "none":
        _apply_full_layer_checkpointing(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = train_step.make_optimizer(options["optimizer"], parameters)
    packed = pack(ours.config, batch, three_dimensional=options["best"])
    packed = {name: value.to(device) if torch.is_tensor(value) else value for name, value in packed.items()}
    packed["nested_attention_masks"] = [mask.to(device) for mask in packed["nested_attention_masks"]]
    tokens = len(packed["packed_latent_position_ids"]) // options["batch_size"]
    generator = torch.Generator().manual_seed(1)
    sample_corruption, config = ours.sample_corruption, ours.config
    del ours

    def step() -> float:
        corruption = sample_corruption(batch, generator)
        logits = torch.logit(corruption["timesteps"].double()).float().repeat_interleave(tokens)
        with given_noise(corruption["noise"].flatten(0, 1)):
            loss = model(**packed, packed_timesteps=logits.to(device))["mse"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    assert config.latent_token_dim == packed["padded_latent"].shape[1] * config.latent_patch_size**2
    step.notes = lambda: {"trained_parameters": sum(parameter.numel() for parameter in parameters)}
    return step


def automodel_config(model: Model):
    """Automodel's configuration of the same model."""
    from nemo_automodel.components.models.bagel.configuration import BagelConfig

    config = model.config
    text = config.text_config.to_dict() | {"layer_module": "Qwen2MoTDecoderLayer", "freeze_und": True}
    text |= {"qk_norm": True, "pad_token_id": 0, "rope_theta": config.text_config.rope_parameters["rope_theta"]}
    vision = config.vision_config.to_dict() | {"num_hidden_layers": config.vision_config.num_hidden_layers + 1}
    for settings in (text, vision):
        settings.pop("model_type", None)
    return BagelConfig(
        text_config=text,
        vision_config=vision,
        visual_gen=True,
        stage=2,
        vae_config={"z_channels": config.vae_config["latent_channels"], "downsample": config.vae_scale_factor},
        max_latent_size=config.max_latent_size,
        vit_max_num_patch_per_side=config.vit_max_num_patch_per_side,
        timestep_shift=config.timestep_shift,
    )


def pack(config, batch: dict[str, Any], three_dimensional: bool) -> dict[str, Any]:
    """Automodel's packed form of a reconstruction batch: one sequence of image, instruction and target a sample."""
    patches, vision_grid = patchify(batch["condition_pixel_values"], config.vision_config.patch_size)
    latents, patch = batch["latents"], config.latent_patch_size
    latent_grid = tuple(side // patch for side in latents.shape[-2:])
    batch_size, vision_length = patches.shape[:2]
    text, target_length = batch["input_ids"][0].tolist(), latent_grid[0] * latent_grid[1]
    start, end = config.image_start_token_id, config.image_end_token_id

    length = vision_length + 2 + len(text) + target_length + 2
    target_start = length - target_length - 2
    mask = torch.zeros(length, length)
    rows, columns = torch.arange(length)[:, None], torch.arange(length)
    split = torch.tensor([0] * (vision_length + 2) + [1] * len(text) + [2] * (target_length + 2))
    visible = (columns <= rows) | ((split[:, None] == split) & (split != 1))
    mask.masked_fill_(~visible, float("-inf"))
    position = [0] * (vision_length + 2) + list(range(1, len(text) + 1)) + [len(text) + 1] * (target_length + 2)
    text_indexes = [0, *range(vision_length + 1, target_start + 1), length - 1]
    text_ids = [start, end, *text, start, end]

    def grid_positions(grid: tuple[int, int], side: int) -> torch.Tensor:
        return (torch.arange(grid[0])[:, None] * side + torch.arange(grid[1])).flatten().repeat(batch_size)

    def everywhere(indexes) -> torch.Tensor:
        return (torch.arange(batch_size)[:, None] * length + torch.tensor(list(indexes))).flatten()

    vit_side = config.vision_config.image_size // config.vision_config.patch_size
    assert vit_side == config.vit_max_num_patch_per_side
    targets = everywhere(range(target_start + 1, length - 1))
    return {
        "sequence_length": batch_size * length,
        "packed_text_ids": torch.tensor(text_ids * batch_size),
        "packed_text_indexes": everywhere(text_indexes),
        "sample_lens": [length] * batch_size,
        "packed_position_ids": torch.tensor(position * batch_size),
        "nested_attention_masks": [mask[None] if three_dimensional else mask] * batch_size,
        "packed_vit_tokens": patches.flatten(0, 1),
        "packed_vit_token_indexes": everywhere(range(1, vision_length + 1)),
        "packed_vit_position_ids": grid_positions(vision_grid, vit_side),
        "vit_token_seqlens": torch.tensor([vision_length] * batch_size),
        "padded_latent": latents,
        "patchified_vae_latent_shapes": [latent_grid] * batch_size,
        "packed_latent_position_ids": grid_positions(latent_grid, config.max_latent_size),
        "packed_vae_token_indexes": targets,
        "mse_loss_indexes": targets,
    }


@contextlib.contextmanager
def given_noise(noise: torch.Tensor):
    """Automodel draws its noise inside the forward pass; hand it the noise that the other side has."""
    from nemo_automodel.components.models.bagel import model as module

    class Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def randn_like(tensor: torch.Tensor) -> torch.Tensor:
            return noise.to(tensor)

    module.torch = Torch()
    try:
        yield
    finally:
        module.torch = torch


def to_cpu() -> None:
    """Bind what Automodel has for CUDA only to float32 equivalents: the choice of CUDA's memory-efficient kernel, casts
    to bfloat16 around attention, and flash-attn's packed attention in the image encoder."""
    from nemo_automodel.components.models.bagel import modeling_qwen2_packed, modeling_siglip_navit

    class Torch:
        bfloat16 = torch.float32

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    def packed_attention(query, key, value, cu_seqlens_q, max_seqlen_q, **_) -> torch.Tensor:
        query, key, value = (x.unflatten(0, (-1, max_seqlen_q)).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(0, 1)

    modeling_qwen2_packed.torch = modeling_siglip_navit.torch = Torch()
    modeling_qwen2_packed.sdpa_kernel = lambda backends: contextlib.nullcontext()
    modeling_siglip_navit._flash_attn_varlen = packed_attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mid", choices=list(presets.PRESETS))
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=list(train_step.DTYPES))
    parser.add_argument("--mode", default="full", choices=["full", "lora"])
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument(
        "--checkpointing",
        default="none",
        choices=["none", *train_step.CHECKPOINTING],
        help="the peer always recomputes whole layers, if any",
    )
    parser.add_argument("--optimizer", default="adamw_fused")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns")
    options = vars(parser.parse_args())
    common = {**options, "images": "latents", "compile": False, "timesteps_per_image": 1}
    common["instruction_lengths"] = [presets.INSTRUCTION_LENGTH]

    mode = options["mode"]
    workloads = {
        f"reca_trainer {mode}": (train_step.build, common),
        f"reca_trainer compiled {mode}": (train_step.build, common | {"compile": True}),
        f"automodel {mode}": (build_automodel, common | {"best": False}),
        f"automodel best {mode}": (build_automodel, common | {"best": True}),
    }
    if mode != "full":
        workloads["automodel best full"] = (build_automodel, common | {"mode": "full", "best": True})
    run = measure.run_alternating(
        workloads, options["warmup"], options["steps"], options["rounds"], options["threads"]
    )
    results = run["results"]
    expected = torch.tensor(results[f"reca_trainer {mode}"]["losses"])
    for name in (
        f"reca_trainer compiled {mode}",
        f"automodel {mode}",
        f"automodel best {mode}",
    ):  # equal after equal updates: so are the gradients
        torch.testing.assert_close(torch.tensor(results[name]["losses"]), expected, rtol=1e-4, atol=0)
    print(
        json.dumps(
            {
                "benchmark": "peer_automodel",
                **options,
                **run,
                "ratios": ratios(results),
                "matmul_gflops": round(
                    measure.matmul_rate(options["device"], train_step.DTYPES[options["dtype"]], options["threads"])
                    / 1e9,
                    1,
                ),
                **measure.environment(options["device"]),
            }
        )
    )


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times faster than the peer our step is, and which share of its peak memory it takes."""
    memory = "peak_allocated_gb" if "peak_allocated_gb" in next(iter(results.values())) else "peak_rss_gb"
    ours = {name: result for name, result in results.items() if name.startswith("reca_trainer")}
    return {
        f"{name} / {peer}": {
            "speedup_of_fastest": round(theirs["step_seconds_min"] / mine["step_seconds_min"], 3),
            "speedup_of_medians": round(theirs["step_seconds_median"] / mine["step_seconds_median"], 3),
            "speedup_of_cpu_seconds": round(theirs["cpu_seconds_min"] / mine["cpu_seconds_min"], 3),
            "memory": round(mine[memory] / theirs[memory], 3),
        }
        for name, mine in ours.items()
        for peer, theirs in results.items()
        if peer not in ours
    }


if __name__ == "__main__":
    main()
