"""What `RecATrainer` uploads: adapters, trained models and merged ones, each with its card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from reca_trainer import adapters
from reca_trainer.saving import hub
from reca_trainer.saving.card import base_license, model_card, public_name
from reca_trainer.saving.export import export
from reca_trainer.saving.merge import merge_adapter
from reca_trainer.tasks import TASKS

logger = logging.get_logger(__name__)


class HubUploads(Trainer if TYPE_CHECKING else object):
    """The part of `RecATrainer` that writes model cards and uploads."""

    def create_model_card(self, model_name: str | None = None, *, merged: bool = False, **card: Any) -> None:
        """Write `README.md` into the output folder; `card` replaces entries of `card.model_card`."""
        if self.is_world_process_zero():
            self._model_card(model_name, merged, **card).save(Path(self.args.output_dir) / "README.md")

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        **card: Any,
    ):
        """Upload the adapter, or the fully trained model, with processor, card and previews, to `args.hub_model_id`; see
        `hub.push`. It always waits for the upload to end, whatever `blocking` says."""
        args, token = self.args, token or self.args.hub_token
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        repo_id = args.hub_model_id or Path(args.output_dir).absolute().name
        self.create_model_card(repo_id, **card)
        return hub.push(
            args.output_dir,
            repo_id,
            private=args.hub_private_repo if private is None else private,
            revision=revision or args.hub_revision,
            token=token,
            create_pr=create_pr,
            commit_message=commit_message,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload its weights in the background, unless the last upload is still under way. The run goes on where that
        fails: its checkpoints are here."""
        args = self.args
        busy = self.is_world_process_zero() and self.push_in_progress and not self.push_in_progress.is_done()
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END or busy:
            return
        job = HfApi().run_as_future(
            hub.push,
            checkpoint_folder,
            self.hub_model_id,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            token=args.hub_token,
            commit_message=f"Training in progress, step {self.state.global_step}",
        )
        job.add_done_callback(
            lambda done: (
                done.exception() and logger.warning(f"{checkpoint_folder} was not uploaded: {done.exception()}")
            )
        )
        self.push_in_progress = PushInProgress([job])

    def push_merged_to_hub(
        self,
        repo_id: str,
        into: str | None = None,
        dtype: torch.dtype | None = None,
        *,
        layout: str = "transformers",
        token: str | None = None,
        private: bool | None = None,
        **upload: Any,
    ):
        """Merge the adapter (see `merge_adapter` for `into`, `dtype` and `layout`) and upload the whole model;
        `upload` as for `hub.push`. The merged copy lies in the output folder meanwhile."""
        folder = Path(self.args.output_dir) / ".merged"
        self.save_model(str(folder / "adapter"), _internal_call=True)
        if not self.is_world_process_zero():
            return None
        base = adapters.unwrap(self.model)
        options = {"dtype": dtype, "layout": layout, "processor": self.processing_class}
        token = token or self.args.hub_token
        try:
            if isinstance(self.model, PeftModel):
                source = base.name_or_path or base
                merge_adapter(source, folder / "adapter", folder / "model", into, token=token, **options)
            else:
                export(base, folder / "model", **options)
            self._model_card(repo_id, merged=True).save(folder / "model" / "README.md")
            for picture in Path(self.args.output_dir).glob("previews/before_after.png"):
                (folder / "model" / "previews").mkdir()
                shutil.copy(picture, folder / "model" / "previews")
            private = self.args.hub_private_repo if private is None else private
            return hub.push(folder / "model", repo_id, token=token, private=private, **upload)
        finally:
            shutil.rmtree(folder)

    def _model_card(self, repo_id: str | None, merged: bool, **card: Any):
        args, base = self.args, adapters.unwrap(self.model)
        is_adapter = isinstance(self.model, PeftModel) and not merged
        names = ("learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size",
                 "gradient_accumulation_steps", "optim", "adam_beta2", "weight_decay", "max_grad_norm", "bf16", "seed",
                 "instruction_dropout")  # fmt: skip
        settings = {name: getattr(args, name) for name in names} | {"processes": args.world_size}
        if args.ema_decay:
            settings["weights"] = f"exponential moving average, decay {args.ema_decay:g}"
        settings |= {f"weight of {TASKS[task].loss_name}": weight for task, weight in self.loss_weights.items()}
        if isinstance(self.model, PeftModel):
            peft_config = self.model.active_peft_config
            settings |= {name: getattr(peft_config, name, None) for name in ("r", "lora_alpha", "lora_dropout")}
            settings["base loaded in"] = (
                "4 bits" if getattr(base, "is_loaded_in_4bit", False)
                else "8 bits" if getattr(base, "is_loaded_in_8bit", False) else str(base.dtype)
            )  # fmt: skip
        last: dict[str, float] = {}
        for entry in self.state.log_history:
            last |= {name: value for name, value in entry.items() if name.endswith("loss")}
        if "train_loss" in last:
            last["mean train_loss"] = last.pop("train_loss")
        source = base.name_or_path or None
        preview = Path("previews/before_after.png")
        defaults = {
            "base_model": source,
            "is_adapter": is_adapter,
            "datasets": [public_name(name) for name in (args.dataset_name, args.caption_dataset_name) if name],
            "hyperparameters": settings,
            "losses": last,
            "steps": self.state.global_step,
            "license": base_license(source, args.hub_token),
            "preview": str(preview) if (Path(args.output_dir) / preview).is_file() else None,
        }
        return model_card(repo_id or args.hub_model_id or Path(args.output_dir).absolute().name, **(defaults | card))
