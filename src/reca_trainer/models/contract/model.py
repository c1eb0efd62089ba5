"""The half of the contract that computes: `UnifiedModel`."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from PIL import Image
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from reca_trainer.models.contract.output import UnifiedOutput
from reca_trainer.models.contract.processor import UnifiedProcessor
from reca_trainer.models.inference import (
    check_generators,
    check_sampling,
    check_side,
    read_images,
    read_text,
    spread,
    warning_of_cut_texts,
)
from reca_trainer.models.precision import apply_frozen_dtype, autocast_frozen, loading_frozen_in

Generators = torch.Generator | list[torch.Generator] | None

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def evaluating(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorate a method of a `UnifiedModel` that samples: it runs in eval mode and without gradients, and leaves the
    model in the mode it was in, even if it fails."""

    @functools.wraps(method)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        model: Any = args[0]
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), autocast_frozen(model):
                return method(*args, **kwargs)
        finally:
            model.train(training)

    return run


class UnifiedModel(PreTrainedModel):
    """A model that understands and generates images, as RecA sees it.

    A family sets the attributes, and implements one method per task (`_reconstruct`, `_caption`, `_generate`), the three
    encodings, the two methods about randomness and the two that generate (`_generate_images`, `_generate_text`).

    Attributes:
        tasks: the tasks that the family can do; others are refused by name.
        shares_weights: whether understanding and generation run through the same weights. If so RecA trains them with
            an image-to-text loss beside the reconstruction loss (paper, section 3); if not, understanding is frozen.
        lora_target_modules: regular expression that fully matches the names of the generator's linear layers. May be a
            property that depends on the config.
        quantized_modules: regular expression that fully matches the names of the linear layers a `BitsAndBytesConfig`
            quantises; by default `lora_target_modules`. All others stay as they are.
        image_tasks: the tasks of `generate_images`.
        image_sides: the possible heights and widths of generated images, in pixels; `None` where the processor's
            `fixed_size` is the only size.
        no_guidance_scale: the `guidance_scale` of `generate_images` that turns classifier-free guidance off. Scales are
            the original's numbers, so that published values stay valid.
        sampling_defaults: arguments of `_generate_images` by task, where the original's differ from that method's
            defaults.
        frozen_encoders: names of the submodules that `encode_batch` computes with; none where a family has no such
            method.
        supports_timesteps_per_image: whether `sample_corruption` takes a batch with a further entry `timesteps_per_image`,
            an int K, and draws for K noisy copies of each target, all behind one condition. `forward` reads K off these
            draws and does not take the entry.
        supports_condition_token_dropout: whether `_reconstruct` hides embeddings of the condition as
            `models.common.condition_dropout.drop_condition` says.
        condition_token_dropout: share of the condition's embeddings that is dropped unless a run says otherwise.
        license_note: what a model card says of the licence beside its name, in Markdown.
    """

    tasks: tuple[str, ...] = ("reconstruct", "caption", "generate")
    shares_weights: bool = False
    lora_target_modules: str = ""
    quantized_modules: str = ""
    image_tasks: tuple[str, ...] = ("generate", "reconstruct")
    no_guidance_scale: float = 1.0
    sampling_defaults: Mapping[str, Mapping[str, Any]] = {}
    frozen_encoders: tuple[str, ...] = ()
    supports_timesteps_per_image: bool = False
    supports_condition_token_dropout: bool = False
    condition_token_dropout: float = 0.0
    license_note: str = ""
    frozen_dtype: torch.dtype | None = None
    config_class: type[PreTrainedConfig]  # a family always has one
    main_input_name = "pixel_values"

    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # transformers before 5.23 has the older name

        def activation_checkpointing_enable(  # type: ignore[override]
            self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
        ) -> None:
            self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    else:

        @property
        def is_gradient_checkpointing(self) -> bool:
            return self.is_activation_checkpointing  # PEFT asks by the older name, and transformers would warn of it

    def post_init(self) -> None:
        """As `PreTrainedModel.post_init`, and `_no_split_modules`, the layers that FSDP wraps, keeps only those that the
        model has: parts of other libraries list all that their class could have, and accelerate refuses missing ones."""
        self.__dict__.pop("_no_split_modules", None)  # set by a superclass, before this class added modules
        super().post_init()
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = {name for name in self._no_split_modules or () if name in present}
        apply_frozen_dtype(self)

    @property
    def dtype(self) -> torch.dtype:
        """As in `PreTrainedModel`; where frozen weights have a dtype of their own, that of the trained ones."""
        return super().dtype if self.frozen_dtype is None else torch.float32

    @property
    def image_sides(self) -> range | None:
        return None

    @property
    def generation_modules(self) -> list[str]:
        """Names of the submodules (or parameters) that RecA trains."""
        raise NotImplementedError

    @property
    def understanding_modules(self) -> list[str]:
        """Names of the submodules that only understanding uses: frozen and in eval mode during RecA."""
        raise NotImplementedError

    @property
    def frozen_modules(self) -> list[str]:
        """Names of the submodules that are never trained and always in eval mode: autoencoders; none by default."""
        return []

    # --- losses ---

    def forward(self, task: str, corruption: dict[str, torch.Tensor] | None = None, **batch: Any) -> UnifiedOutput:
        """Compute one task's loss. A training step computes nothing elsewhere, so that DDP, FSDP and ZeRO see all of it.

        Args:
            task: one of `self.tasks`; the method `_<task>` computes it.
            corruption: the random draws of the generation loss, from `sample_corruption`; drawn here if `None`.
            batch: the tensors of the batch, see `reca_trainer.models.contract`.

        Raises:
            ValueError: the family cannot do the task, or a key of the batch means nothing to it.
        """
        self._check_batch(task, batch)
        if corruption is None:
            corruption = self.sample_corruption({"task": task, **batch})
        return getattr(self, f"_{task}")(corruption, **batch)

    def _check_batch(self, task: str, batch: dict[str, Any]) -> None:
        if task not in self.tasks:
            raise ValueError(f"{type(self).__name__} cannot do the task {task!r}; it can do {', '.join(self.tasks)}.")
        _, *known = inspect.signature(getattr(self, f"_{task}")).parameters  # the first is `corruption`
        if unknown := sorted(set(batch) - set(known)):
            raise ValueError(
                f"The task {task!r} of {type(self).__name__} has no use for {', '.join(unknown)} in its batch; it takes "
                f"{', '.join(known)}."
            )

    # --- encodings ---

    def encode_condition(self, condition_pixel_values: torch.Tensor) -> torch.Tensor:
        """Images `[B, 3, h, w]` to the understanding embeddings `[B, S, D]` that the language model reads: `E(x_und)`."""
        raise NotImplementedError

    def encode_target(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] to what the generator learns to make: latents, or tokens `[B, N]` int64."""
        raise NotImplementedError

    def decode_target(self, target: torch.Tensor) -> torch.Tensor:
        """Back from latents or tokens to images `[B, 3, H, W]`, about [-1, 1]."""
        raise NotImplementedError

    def encode_batch(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Tensors `[B, ...]` that `forward`, `sample_corruption` and `count_supervised` take instead of the images of a
        `reconstruct` batch. They depend only on the image, its size and the weights of `frozen_encoders`."""
        raise NotImplementedError

    # --- draws and counts ---

    def sample_corruption(self, batch: dict[str, Any], generator: Generators = None) -> dict[str, torch.Tensor]:
        """Draw everything random in the generation loss of `batch` (timesteps and noise, or masks and orders).

        With a list of generators, one per sample, a sample's draws do not depend on the batch it is in: that is what
        makes runs on different numbers of processes comparable. Tensors come back on the CPU, in float32 where they
        are floating point. Tasks without randomness give an empty dict.
        """
        raise NotImplementedError

    def count_supervised(self, batch: dict[str, Any], corruption: dict[str, torch.Tensor]) -> int:
        """Number of targets that `loss` averages over, known before the forward pass.

        The trainer weights micro-batches by it, so that accumulated or distributed batches give the loss of one large
        batch. A wrong number gives wrong weights without an error, so there is no default.
        """
        raise NotImplementedError

    @classmethod
    def published_config(cls) -> PreTrainedConfig:
        """The configuration of the checkpoint that the family's name stands for; by default that of no arguments."""
        return cls.config_class()

    def example_batch(
        self,
        batch_size: int,
        max_image_size: int | None = None,
        min_image_size: int | None = None,
        text_length: int = 32,
    ) -> dict[str, Any]:
        """A `reconstruct` batch with the shapes that a processor gives large square pictures. Its pixels are zero, and its
        token ids are right only where an image goes.

        Args:
            max_image_size, min_image_size: bounds of the target's sides in pixels, as in `UnifiedProcessor.target_size`.
            text_length: tokens of a sample that are not an image's: its instruction and what is put around it.

        Raises:
            ValueError: the family's targets cannot have such a size.
        """
        raise NotImplementedError

    # --- sampling ---

    @evaluating
    def generate_images(
        self,
        processor: UnifiedProcessor,
        text: str | list[str] | None = None,
        images: Image.Image | list[Image.Image] | None = None,
        *,
        task: str = "generate",
        generator: Generators = None,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | list[str] | None = None,
        **sampling: Any,
    ) -> list[Image.Image]:
        """Generate one image per prompt (`task="generate"`), per image from its understanding embeddings
        (`task="reconstruct"`, `text` is then the instruction), or edit (`task="edit"`, where the family can).

        It runs in eval mode and without gradients.

        Args:
            text: prompts or instructions: a list with one per image, or one for all. `""` leaves the words out; a
                reconstruction needs none. Texts are tokenised as in training, and shortened with a warning where they
                are longer than the family takes.
            images: PIL images, paths or encoded bytes: a list, or one for all texts. They are read as for training, see
                `reca_trainer.images.decode_image`.
            generator: one generator, or a list with one per image: then an image does not depend on the others.
            height, width: of the output in pixels; by default what the processor makes.
            negative_prompt: what classifier-free guidance leads away from, in place of the family's unconditional prompt:
                one per image, or one for all.
            sampling: `num_inference_steps`, `guidance_scale` and the other arguments of the family's `_generate_images`;
                defaults are that method's, changed for a task by `sampling_defaults`.

        Returns:
            A list of RGB images, also for a single prompt.

        Raises:
            ValueError: a task, size or argument that the family does not have; texts, images or generators that are
                missing or differ in number; a negative prompt without guidance.
        """
        name = type(self).__name__
        if task not in self.image_tasks:
            raise ValueError(f"task={task!r}, but {name} makes images for {', '.join(self.image_tasks)}.")
        if text is None and task != "reconstruct":
            raise ValueError(f'task={task!r} needs text; "" leaves the words out.')
        if (images is None) != (task == "generate"):
            needs = "takes no images" if task == "generate" else "needs images"
            raise ValueError(f"task={task!r} {needs}.")
        inputs = spread(
            {
                "text": None if text is None else read_text("text", text),
                "images": None if images is None else read_images("images", images),
                "negative_prompt": None if negative_prompt is None else read_text("negative_prompt", negative_prompt),
            }
        )
        check_generators(generator, len(inputs["images"] or inputs["text"] or []))
        sampling = {**self.sampling_defaults.get(task, {}), **sampling}
        self._check_size(processor, height, width)
        if sampling.get("num_inference_steps") is not None and sampling["num_inference_steps"] < 1:
            raise ValueError(f"num_inference_steps is at least 1, got {sampling['num_inference_steps']}.")
        parameters = inspect.signature(self._generate_images).parameters
        if negative_prompt is not None:
            if "negative_prompt" not in parameters:
                raise ValueError(f"{name} has no classifier-free guidance that a negative_prompt could lead.")
            if sampling.get("guidance_scale", parameters["guidance_scale"].default) <= self.no_guidance_scale:
                raise ValueError(
                    f"A negative_prompt needs guidance: a guidance_scale above {self.no_guidance_scale:g}."
                )
            sampling["negative_prompt"] = inputs["negative_prompt"]
        check_sampling(name, self._generate_images, sampling)
        sides = {"height": height, "width": width}
        sampling.update({side: value for side, value in sides.items() if side in parameters})
        with warning_of_cut_texts(processor):
            return self._generate_images(
                processor, inputs["text"], inputs["images"], task=task, generator=generator, **sampling
            )

    def _check_size(self, processor: UnifiedProcessor, height: int | None, width: int | None) -> None:
        fixed = processor.fixed_size
        for index, (name, side) in enumerate({"height": height, "width": width}.items()):
            sides = self.image_sides
            if sides is None and fixed is not None:
                sides = range(fixed[index], fixed[index] + 1)
            if sides is not None:
                check_side(type(self).__name__, name, side, sides)

    def _generate_images(
        self,
        processor: Any,
        text: list[str] | None,
        images: list[Image.Image] | None,
        *,
        task: str,
        generator: Generators,
        **sampling: Any,
    ) -> list[Image.Image]:
        """The family's part of `generate_images`, called with checked arguments.

        Args:
            text, images: lists of one length; images are upright RGB. `text` is `None` where a reconstruction has no
                instructions, `images` is `None` in text-to-image.
            task: one of `image_tasks`.
            sampling: the family names each of its arguments, with defaults; others are refused. Among them are `height`
                and `width` where it has `image_sides`, `negative_prompt` (a list, or `None`) where it has guidance.
        """
        raise NotImplementedError

    @evaluating
    def generate_text(
        self,
        processor: UnifiedProcessor,
        text: str | list[str],
        images: Image.Image | list[Image.Image] | None = None,
        *,
        generator: Generators = None,
        **sampling: Any,
    ) -> list[str]:
        """Answer each question in `text`, about the image at the same place in `images` if given.

        Args:
            text, images: as in `generate_images`; a single question is asked about every image, a single image serves
                every question.
            generator: for answers that are sampled; they are greedy by default. One generator, or a list with one per
                question where the family draws each answer on its own.
            sampling: `max_new_tokens`, `temperature` and the other arguments of the family's `_generate_text`.

        Returns:
            A list of answers, also for a single question.

        Raises:
            ValueError: the family answers no questions, or has no such argument; texts, images or generators that differ
                in number.
        """
        name = type(self).__name__
        if "caption" not in self.tasks:
            raise ValueError(f"{name} answers no questions; it can do {', '.join(self.tasks)}.")
        inputs = spread(
            {
                "text": read_text("text", text),
                "images": None if images is None else read_images("images", images),
            }
        )
        questions = inputs["text"] or []
        check_generators(generator, len(questions))
        check_sampling(name, self._generate_text, sampling)
        with warning_of_cut_texts(processor):
            return self._generate_text(processor, questions, inputs["images"], generator=generator, **sampling)

    def _generate_text(
        self,
        processor: Any,
        text: list[str],
        images: list[Image.Image] | None,
        *,
        generator: Generators,
        **sampling: Any,
    ) -> list[str]:
        """The family's part of `generate_text`, called with checked arguments as `_generate_images` is."""
        raise NotImplementedError

    # --- loading, saving and training ---

    @classmethod
    def from_pretrained(
        cls, *args: Any, quantization_config: Any = None, frozen_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> UnifiedModel:
        """As `PreTrainedModel.from_pretrained`.

        Args:
            quantization_config: a `BitsAndBytesConfig` quantises `quantized_modules`, but for the layers that its
                `llm_int8_skip_modules` names.
            frozen_dtype: with `dtype` float32, the dtype of the weights that `models.precision` names; the model then
                computes under an autocast to it.

        Raises:
            ValueError: an entry of `llm_int8_skip_modules` is none of `quantized_modules`.
        """
        chosen: list[str] = []
        if isinstance(quantization_config, BitsAndBytesConfig):
            quantization_config = copy.deepcopy(quantization_config)
            # The entries of this list are regular expressions too: one that matches every name but these.
            skip = rf"(?!(?:{cls.quantized_modules or cls.lora_target_modules})$).*"
            chosen = [entry for entry in quantization_config.llm_int8_skip_modules or () if entry != skip]
            quantization_config.llm_int8_skip_modules = [skip, *chosen]
        with loading_frozen_in(frozen_dtype):
            loaded = super().from_pretrained(*args, quantization_config=quantization_config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        for module in model.modules():
            # In eval mode on some CPUs bitsandbytes repacks 4-bit weights for bfloat16 inference, for good. Training
            # then has no gradients, and rows that are not a whole number of blocks fail.
            if getattr(module, "support_avx512bf16_for_cpu", False):
                module.support_avx512bf16_for_cpu = False
        model.check_skipped(chosen)
        return loaded

    def check_skipped(self, entries: Sequence[str]) -> None:
        """Raise `ValueError` for an entry of `llm_int8_skip_modules` that names no quantised layer."""
        names = [name for name, layer in self.named_modules() if isinstance(layer, nn.Linear) and self.quantizes(name)]
        for entry in entries:
            if all(self.quantizes(name, [entry]) for name in names):
                raise ValueError(
                    f"llm_int8_skip_modules has {entry!r}, which is none of the {len(names)} layers that are quantised: "
                    f"{', '.join(names[:5])}, …"
                )

    def quantizes(self, name: str, skipped: Sequence[str] = ()) -> bool:
        """Whether a `BitsAndBytesConfig` with these `llm_int8_skip_modules` quantises the linear layer `name`."""
        pattern = self.quantized_modules or self.lora_target_modules
        return bool(re.fullmatch(pattern, name)) and should_convert_module(name, list(skipped))

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, under the module names of this model. transformers would write a part such
        as InternVL under the names it was published with."""
        kwargs["save_original_format"] = save_original_format
        super().save_pretrained(*args, **kwargs)

    def decays(self, name: str, shape: torch.Size) -> bool:
        """Whether weight decay acts on the parameter `name`, as in the optimiser groups of the original's script.

        Args:
            shape: of the whole parameter, also where it is sharded.
        """
        return len(shape) >= 2

    def freeze_understanding(self) -> None:
        """Leave exactly `generation_modules` trainable, which is what RecA trains."""
        self.requires_grad_(False)
        for name in self.generation_modules:
            parent, _, leaf = name.rpartition(".")
            module = getattr(self.get_submodule(parent), leaf)
            module.requires_grad_(True)

    def train(self, mode: bool = True) -> UnifiedModel:
        """As `torch.nn.Module.train`, but `understanding_modules` and `frozen_modules` stay in eval mode."""
        super().train(mode)
        for name in [*self.understanding_modules, *self.frozen_modules]:
            self.get_submodule(name).eval()
        return self


def per_sample(
    draw: Callable[[torch.Generator | None], torch.Tensor], batch_size: int, generator: Generators
) -> torch.Tensor:
    """Stack `draw(generator)` over the samples of a batch: `[B, ...]`, each from its own generator if there are several."""
    generators = generator if isinstance(generator, list) else [generator] * batch_size
    if len(generators) != batch_size:
        raise ValueError(f"Got {len(generators)} generators for a batch of {batch_size} samples; pass one per sample.")
    return torch.stack([draw(sample_generator) for sample_generator in generators])
