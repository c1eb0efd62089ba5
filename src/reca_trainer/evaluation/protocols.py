"""How the authors of RecA sampled the images they scored, benchmark by benchmark and family by family.

The values are those of the evaluation scripts in the authors' repository,
https://github.com/HorizonWind2004/reconstruction-alignment (December 2025); each entry names its script. BAGEL's scripts
count 50 time points, between which its 49 steps lie. Where a script fixes no size, the checkpoint's own is right.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Protocol:
    """How the images of one benchmark are made with one family.

    Args:
        source: the script that says so; `None` where the model's own defaults hold.
        sampling: arguments of `generate_images`.
        images_per_prompt: of benchmarks that draw several.
        prompt_prefix: put before each prompt.
        instruction: of a reconstruction; `None` leaves it to the caller.
    """

    source: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    images_per_prompt: int = 4
    prompt_prefix: str = ""
    instruction: str | None = None


_BAGEL: dict[str, Any] = {"num_inference_steps": 49, "timestep_shift": 3.0, "guidance_renorm_min": 0.0}
_BAGEL_IMAGE = {**_BAGEL, "guidance_renorm": "global", "height": 1024, "width": 1024}
_BAGEL_EDIT = {**_BAGEL, "guidance_scale": 4.0, "image_guidance_scale": 1.5, "guidance_renorm": "text_channel"}
_HARMON = {"num_inference_steps": 64, "guidance_scale": 3.0, "guidance_schedule": "constant", "temperature": 1.0}
_HARMON |= {"height": 512, "width": 512}
_OPENUNI = {"num_inference_steps": 20, "guidance_scale": 4.5}
_SHOW_O = {"num_inference_steps": 50, "guidance_scale": 5.0, "temperature": 1.0}
_WHOLE, _FIRST_STEPS = [0.0, 1.0], [0.4, 1.0]  # guidance intervals

# By benchmark and `model_type`. Harmon and OpenUni prefix every prompt by themselves.
PAPER: dict[str, dict[str, Protocol]] = {
    "geneval": {
        "bagel": Protocol(
            "BAGEL/eval/gen/gen_images_mp.py",
            {**_BAGEL_IMAGE, "guidance_scale": 4.0, "guidance_interval": _WHOLE},
            images_per_prompt=12,
        ),
        "harmon": Protocol("Harmon/scripts/geneval.py", _HARMON, images_per_prompt=12),
        "openuni": Protocol("OpenUni/scripts/evaluation/gen_eval.py", _OPENUNI, images_per_prompt=12),
        "show_o": Protocol("Show-o/scripts/inference_benchmark.py", _SHOW_O, images_per_prompt=12),
    },
    "dpg": {
        "bagel": Protocol(
            "BAGEL/eval/gen/gen_images_dpg.py",
            {**_BAGEL_IMAGE, "guidance_scale": 3.0, "guidance_interval": _WHOLE},
            prompt_prefix="Generate an image: ",
        ),
        "harmon": Protocol("Harmon/scripts/dpgbench.py", _HARMON),
        "openuni": Protocol("OpenUni/scripts/evaluation/dpg_bench.py", _OPENUNI),
        "show_o": Protocol("Show-o/scripts/inference_benchmark.py", _SHOW_O),
    },
    "reconstruction": {
        "harmon": Protocol("Harmon/scripts/image_recon.py", _HARMON, instruction="Describe the image in detail."),
        "openuni": Protocol(
            "OpenUni/scripts/image_edit.py",
            {**_OPENUNI, "negative_prompt": "Keep the image as it is."},
            instruction="Describe the image in details",
        ),
    },
    "wise": {
        "bagel": Protocol(
            "BAGEL/eval/gen/gen_images_mp_wise.py",
            {**_BAGEL_IMAGE, "guidance_scale": 4.0, "guidance_interval": _FIRST_STEPS},
        ),
        "openuni": Protocol("OpenUni/scripts/evaluation/wise.py", _OPENUNI),
        "show_o": Protocol("Show-o/scripts/inference_benchmark.py", _SHOW_O),
    },
    "imgedit": {
        "bagel": Protocol("BAGEL/eval/gen/gen_images_mp_imgedit.py", {**_BAGEL_EDIT, "guidance_interval": _WHOLE}),
    },
    "gedit": {
        "bagel": Protocol("Benchmark/gedit/gen_images_gedit.py", {**_BAGEL_EDIT, "guidance_interval": _FIRST_STEPS}),
    },
}


def find_protocol(name: str, benchmark: str, model_type: str) -> Protocol:
    """The protocol of that name; an empty one for `"default"`.

    Args:
        name: `"default"` or `"paper"`.
        benchmark: `"geneval"`, `"dpg"` or `"reconstruction"`, or a task of lmms-eval such as `"gedit_bench_en"`.
        model_type: of the model's config.

    Raises:
        ValueError: `name` is neither, or the authors did not run that family on that benchmark.
    """
    if name == "default":
        return Protocol()
    if name != "paper":
        raise ValueError(f"protocol is {name!r}; it must be 'default' or 'paper'.")
    families = next((PAPER[key] for key in PAPER if benchmark.lower().startswith(key)), {})
    if model_type not in families:
        known = ", ".join(families) or "no family"
        raise ValueError(
            f"The paper has no protocol for {model_type} on {benchmark} (but for {known}): leave --protocol out and give "
            "--sampling."
        )
    return families[model_type]
