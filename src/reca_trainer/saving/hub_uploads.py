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
from reca_trainer.saving.card import PREVIEW, base_license, last_losses, model_card, save_card, this_environment
from reca_trainer.saving.export import export
from reca_trainer.saving.merge import merge_adapter
from reca_trainer.saving.run_checkpoints import by_main_process
from reca_trainer.tasks import TASKS

logger = logging.get_logger(__name__)


class HubUploads(Trainer if TYPE_CHECKING else object):
    """The part of `RecATrainer` that writes model cards and uploads."""

    _repo_id: str | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make sure that the run's repository is there, before anything is trained that could not be uploaded.

        Raises:
            PermissionError: not logged in, or no right to write there.
            ConnectionError: the Hub cannot be reached.
            ValueError: the token cannot be one.
        """
        args = self.args
        if token is not None or private is not None or self._repo_id is None:
            name = args.hub_model_id or Path(args.output_dir).absolute().name
            options = (args.hub_private_repo if private is None else private, args.hub_revision, token or args.hub_token)
            self._repo_id = by_main_process(args, lambda: hub.make_repo(name, *options))
        self.hub_model_id, self.push_in_progress = self._repo_id, None

    def create_model_card(self, model_name: str | None = None, *, merged: bool = False, **card: Any) -> None:
        """Write `README.md` into the output folder; `card` replaces entries of `card.model_card`. Where that fails, a
        warning says so, since the weights do not depend on it."""
        if self.is_world_process_zero():
            self._write_card(Path(self.args.output_dir), model_name, merged, **card)

    def _write_card(self, folder: Path, repo_id: str | None, merged: bool, **card: Any) -> None:
        try:
            save_card(self._model_card(repo_id, merged, **card), folder / "README.md")
        except Exception as error:  # it is made of whatever stands in names, logs and files
            logger.warning(f"There is no model card in {folder}: {error!r}")

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
        """Upload the adapter, or the fully trained model, with processor, card and previews, to `args.hub_model_id`;
        see `hub.push`. It always waits for the upload to end, whatever `blocking` says."""
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        token = hub.checked_token(token or args.hub_token)
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
        """Upload its weights in the background; where the last upload is still under way, only if `hub_always_push`. The
        run goes on where that fails: its checkpoints are here."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        under_way = [] if self.push_in_progress is None else self.push_in_progress.jobs
        under_way = [job for job in under_way if not job.done()]
        if under_way and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        job = HfApi().run_as_future(
            hub.push,
            checkpoint_folder,
            self.hub_model_id,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            token=args.hub_token,
            commit_message=f"Training in progress, step {self.state.global_step}",
        )

        def report(done: Any) -> None:
            if error := done.exception():
                notes = " ".join(getattr(error, "__notes__", ()))
                logger.warning(f"{checkpoint_folder} was not uploaded: {error} {notes}")

        job.add_done_callback(report)
        self.push_in_progress = PushInProgress([*under_way, job])

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
        `upload` as for `hub.push`. The merged copy lies in `.merged` in the output folder meanwhile, and stays there if
        it could not be uploaded; the error's note has the command that pushes it again."""
        folder = Path(self.args.output_dir) / ".merged"
        token = hub.checked_token(token or self.args.hub_token)
        if self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)  # of an upload that failed before
        self.save_model(str(folder / "trained"), _internal_call=True)
        if not self.is_world_process_zero():
            return None
        base, model = adapters.unwrap(self.model), folder / "model"
        options = {"dtype": dtype, "layout": layout, "processor": self.processing_class}
        try:
            if isinstance(self.model, PeftModel):
                source = base.name_or_path or base
                merge_adapter(source, folder / "trained", model, into, token=token, **options)
            else:
                export(folder / "trained", model, **options)
        except BaseException:
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder / "trained")
        # A family from outside the package names its published files as it likes.
        others = [*hub.uploaded_files(model)[1], *upload.pop("also", ())]
        self._write_card(model, repo_id, merged=True)
        if (picture := Path(self.args.output_dir) / PREVIEW).is_file():
            try:
                (model / PREVIEW).parent.mkdir()
                shutil.copy(picture, model / PREVIEW)
            except OSError as error:
                logger.warning(f"{picture} is not uploaded: {error}.")
        private = self.args.hub_private_repo if private is None else private
        commit = hub.push(model, repo_id, token=token, private=private, also=others, **upload)
        shutil.rmtree(folder)
        return commit

    def _model_card(self, repo_id: str | None, merged: bool, **card: Any):
        args, base = self.args, adapters.unwrap(self.model)
        is_adapter = isinstance(self.model, PeftModel) and not merged
        names = ("learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size",
                 "gradient_accumulation_steps", "optim", "adam_beta2", "weight_decay", "max_grad_norm", "bf16", "seed",
                 "instruction_dropout")  # fmt: skip
        settings = {name: getattr(args, name) for name in names} | {"processes": args.world_size}
        if args.freeze_modules:
            settings["not trained"] = ", ".join(args.freeze_modules)
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
        source = base.name_or_path or None
        defaults = {
            "base_model": source,
            "is_adapter": is_adapter,
            "datasets": [name for name in (args.dataset_name, args.caption_dataset_name, args.edit_dataset_name) if name],
            "hyperparameters": settings,
            "losses": last_losses(self.state.log_history),
            "steps": self.state.global_step,
            "license": base_license(source, args.hub_token),
            "license_note": base.license_note,
            "preview": PREVIEW if (Path(args.output_dir) / PREVIEW).is_file() else None,
            "environment": this_environment(),
        }
        return model_card(repo_id or args.hub_model_id or Path(args.output_dir).absolute().name, **(defaults | card))
