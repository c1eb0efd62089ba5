"""Our models in lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), which maintains WISE, ImgEdit, GEdit-Bench
and the understanding benchmarks. It finds this module by itself once both packages are installed:

    accelerate launch -m lmms_eval --model reca_trainer --tasks WISE \
        --model_args pretrained=ByteDance-Seed/BAGEL-7B-MoT,adapter=me/bagel-reca,mode=images

`--tasks imgedit` and `--tasks gedit_bench` the same way (`imgedit` also wants `--process_with_media`), and with
`mode=text` any question-answering task, such as `--tasks mme`. Further `model_args` go to `generate_images` or
`generate_text` (`num_inference_steps=50`, `guidance_interval=[0.0,1.0]`, …); `protocol=paper` samples images as the authors
of RecA did for the task, and `prompts_file=FILE` draws WISE's rewritten prompts. `reca-trainer evaluate --benchmark
understanding` runs the question-answering tasks of the paper at once.

Its image benchmarks are judged by a model behind an OpenAI-compatible endpoint, named in the environment:
`WISE_API_KEY`, `WISE_BASE_URL`, `WISE_MODEL_NAME`; the same three with `IMGEDIT_`; for GEdit-Bench `VIESCORE_API_KEY`,
`VIESCORE_API_BASE`, `VIESCORE_MODEL_NAME`. Scores of different judges cannot be compared: the published ones come from
GPT-4o. A judge that cannot be reached is an error in the log and a 0 in WISE's score. lmms-eval has no GenEval and no
DPG-Bench (`reca-trainer evaluate` has), and of ImgEdit the single-turn suite only. The models here look at one image at a
time: a question about several, as some of MMMU and the videos of SEED-Bench, shows them side by side in one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm.auto import tqdm

from reca_trainer.evaluation.generation import image_seed, load_model, parse_value, processes
from reca_trainer.evaluation.protocols import find_protocol
from reca_trainer.files import replacing
from reca_trainer.images import decode_image


def manifest() -> ModelManifest:
    """The entry point of group `lmms_eval.models`."""
    return ModelManifest("reca_trainer", simple_class_path=f"{__name__}.RecALmms")


class RecALmms(lmms):
    """A `UnifiedModel` that answers lmms-eval's requests with images or text.

    Args:
        pretrained: folder or Hub id of the model.
        adapter: folder or Hub id of a PEFT adapter for it.
        mode: `"images"` to draw (or to edit, where a task shows an image), `"text"` to answer.
        dtype: of the weights.
        load_in_4bit: NF4 weights, see `evaluation.generation.load_model`.
        batch_size: requests answered at once.
        device, max_batch_size: lmms-eval passes them; accelerate chooses the device and `batch_size` holds.
        output_dir: where images are put.
        seed: determines, with the task and the number of the request, every image.
        protocol: `"paper"` to sample a task's images as the authors of RecA did, see `evaluation.protocols`.
        prompts_file: WISE's rewritten prompts, drawn in place of those that the task then asks its judge about; see
            `read_rewritten`.
        sampling: passed to `generate_images` or `generate_text`; strings are read as JSON where they are.

    Raises:
        ValueError: `mode` or `protocol` is none of the two, the paper has no protocol for the task, or `prompts_file` is
            broken or lacks a prompt of the task.
    """

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        mode: str = "text",
        dtype: str = "bfloat16",
        load_in_4bit: bool | str = False,
        batch_size: int | str = 1,
        output_dir: str = "lmms_eval_images",
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        protocol: str = "default",
        prompts_file: str | None = None,
        **sampling: Any,
    ):
        super().__init__()
        if mode not in ("images", "text"):
            raise ValueError(f"mode is {mode!r}; it must be 'images' or 'text'.")
        if mode == "text" and protocol != "default":
            raise ValueError("protocol is about making images; it needs mode=images.")
        if mode == "text" and prompts_file is not None:
            raise ValueError("prompts_file is about making images; it needs mode=images.")
        self.rewritten = None if prompts_file is None else read_rewritten(prompts_file)
        self.accelerator = Accelerator(cpu=processes().device.type == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device  # where lmms-eval counts the requests of all processes
        in_4bit = str(load_in_4bit).lower()
        if in_4bit not in ("true", "false"):
            raise ValueError(f"load_in_4bit is {load_in_4bit!r}; it must be True or False.")
        self.model, self.processor = load_model(pretrained, adapter, dtype, in_4bit == "true")
        self.mode, self.batch_size, self.seed = mode, int(batch_size), seed
        self.output_dir, self.protocol = Path(output_dir), protocol
        self.sampling = {name: parse_value(value) for name, value in sampling.items()}

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answer requests; an image's answer is JSON that says where it is: `{"text": "", "images": [path]}`."""
        answers: list[str] = []
        with tqdm(total=len(requests), desc="requests", disable=self.rank != 0) as progress:
            while len(answers) < len(requests):
                batch = [self._read(request) for request in requests[len(answers) : len(answers) + self.batch_size]]
                kinds = [(query["image"] is None, query["options"], query["task"]) for query in batch]
                alike = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), len(batch))
                answers += self._answer(batch[:alike])
                progress.update(alike)
        return answers

    def _read(self, request: Any) -> dict[str, Any]:
        text, options, doc_to_visual, doc_id, task, split = request.args
        document = self.task_dict[task][split][doc_id]
        where = f"{task}, request {doc_id}"
        pictures = [decode_image(image, f"an image of {where}") for image in doc_to_visual(document) or []]
        if len(pictures) > 1 and self.mode == "images":
            raise ValueError(f"{where}: it shows {len(pictures)} images; these models draw after one at a time.")
        image = side_by_side(pictures) if pictures else None
        text = text.replace("<image>", "").strip()
        if self.rewritten is not None:
            number = document.get("prompt_id")
            if number not in self.rewritten:
                raise ValueError(f"prompts_file has no prompt for {where} (prompt_id {number!r}).")
            text = self.rewritten[number]
        return {"text": text, "image": image, "task": task, "name": f"{task}_{doc_id}", "options": options}

    def _answer(self, batch: list[dict[str, Any]]) -> list[str]:
        texts = [query["text"] for query in batch]
        images = None if batch[0]["image"] is None else [query["image"] for query in batch]
        if self.mode == "text":
            options = {name: batch[0]["options"][name] for name in ("max_new_tokens",) if name in batch[0]["options"]}
            return self.model.generate_text(self.processor, texts, images, **options | self.sampling)
        protocol = find_protocol(self.protocol, batch[0]["task"], self.model.config.model_type)
        drawn = self.model.generate_images(
            self.processor,
            text=[protocol.prompt_prefix + text for text in texts],
            images=images,
            task="generate" if images is None else "edit",
            generator=[torch.Generator().manual_seed(image_seed(self.seed, query["name"], 0)) for query in batch],
            **{**protocol.sampling, **self.sampling},
        )
        answers = []
        for query, image in zip(batch, drawn, strict=True):
            path = self.output_dir / f"{query['name']}.png"
            with replacing(path) as temporary:
                image.save(temporary, format="PNG")
            answers.append(json.dumps({"text": "", "images": [str(path.resolve())]}))
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("The likelihood of an answer is not part of what these models are asked for.")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("These models answer one request at a time, without a conversation before it.")


def read_rewritten(path: str | Path) -> dict[int, str]:
    """WISE's rewritten prompts by their number: a JSON list of objects with `prompt_id` and `Prompt`, as published.

    Raises:
        ValueError: the file is no such list, or has a number twice; the message names the entry.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must be a JSON list of WISE's prompts.")
    prompts: dict[int, str] = {}
    for place, entry in enumerate(entries):
        number, text = (entry.get("prompt_id"), entry.get("Prompt")) if isinstance(entry, dict) else (None, None)
        if type(number) is not int or not isinstance(text, str):
            raise ValueError(f'{path}, entry {place}, needs a whole number "prompt_id" and a text "Prompt".')
        if number in prompts:
            raise ValueError(f"{path}, entry {place}: prompt_id {number} is already there.")
        prompts[number] = text
    return prompts


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """One picture of several, scaled to the height of the highest; a single one stays as it is."""
    if len(images) == 1:
        return images[0]
    height = max(image.height for image in images)
    scaled = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in images]
    row = Image.new("RGB", (sum(image.width for image in scaled), height))
    left = 0
    for image in scaled:
        row.paste(image, (left, 0))
        left += image.width
    return row
