"""A run's checkpoints: whole or known not to be, and resumed exactly or refused."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from reca_trainer.files import sync

logger = logging.get_logger(__name__)

SEAL = "checkpoint_files.json"
# Entries of an adapter's configuration that do not decide how it computes.
ADAPTER_NOTES = {
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "init_lora_weights",
    "auto_mapping",
}
DATA_ORDER = "data_order.json"


def seal(folder: Path) -> None:
    """Put everything in a checkpoint on disk and write down what belongs to it, and when."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    for path in files:
        sync(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    (folder / SEAL).write_text(json.dumps({"written": time.time(), "bytes": sizes}, indent=1))
    sync(folder / SEAL)
    sync(folder)


def make_output_dir(path: str | os.PathLike) -> None:
    """Raises `OSError` if nothing can be written there."""
    try:
        os.makedirs(path, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    except OSError as error:
        raise OSError(f"Nothing can be saved in output_dir={str(path)!r}: {error}. Choose another folder.") from error


def check_complete(folder: Path) -> float:
    """When a checkpoint was written (Unix time in seconds). Neither its number nor the files' own times tell: a lower
    number follows a higher one after a step back, and copying changes times.

    Raises:
        ValueError: naming the first of its files that is missing or has not the length it was written with.
    """
    if not folder.is_dir():
        raise ValueError(
            f"There is no checkpoint at {folder}. resume_from_checkpoint=True goes on from the newest in output_dir."
        )
    if not (folder / SEAL).is_file():
        raise ValueError(f"{folder} is not complete: it has no {SEAL}, which is written last.")
    try:
        listing = json.loads((folder / SEAL).read_text())
        written, sizes = float(listing["written"]), dict(listing["bytes"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder} is not complete: its {SEAL} is damaged ({error!r}).") from error
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise ValueError(f"{folder} is not complete: {name} should have {size} bytes and has {found or 'none'}.")
    return written


def checkpoints(output_dir: str | os.PathLike) -> tuple[list[Path], dict[Path, str]]:
    """Those that are whole, oldest first, and what is wrong with each of the others."""
    whole, damaged = {}, {}
    for path in sorted(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        if path.name.rpartition("-")[2].isdigit():
            try:
                whole[path] = check_complete(path)
            except ValueError as error:
                damaged[path] = str(error)
    return sorted(whole, key=whole.get), damaged


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint that is whole; those that are not are named in a warning."""
    whole, damaged = checkpoints(output_dir)
    for problem in damaged.values():
        logger.warning(f"{problem} Looking for another one.")
    return str(whole[-1]) if whole else None


def delete_surplus(output_dir: Path, limit: int, keep: set[Path]) -> None:
    """Delete all but `limit` checkpoints: those that are not whole before the others, then the oldest; none of `keep`."""
    whole, damaged = checkpoints(output_dir)
    deletable = [path for path in [*damaged, *whole] if path not in keep]
    for path in deletable[: max(0, len(whole) + len(damaged) - limit)]:
        shutil.rmtree(path)


class RunCheckpoints(Trainer if TYPE_CHECKING else object):
    """The part of `RecATrainer` that writes checkpoints and goes on from them."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """As `Trainer.train`. `resume_from_checkpoint=True` goes on from the newest complete checkpoint in
        `output_dir`, or starts from the beginning, with a warning, if there is none."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                logger.warning(f"There is no checkpoint in {self.args.output_dir} to resume from; starting anew.")
        elif isinstance(resume_from_checkpoint, str | os.PathLike):
            check_complete(Path(resume_from_checkpoint))
        if resume_from_checkpoint:
            self._check_data_order(Path(resume_from_checkpoint))
            self._check_adapter(Path(resume_from_checkpoint))
        if self.is_world_process_zero():
            for abandoned in Path(self.args.output_dir).glob(f".{PREFIX_CHECKPOINT_DIR}-*.partial"):
                shutil.rmtree(abandoned)
        self.resumed_from = resume_from_checkpoint or None
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if result.global_step == self._initial_global_step:
            logger.warning(
                f"Nothing was trained: {resume_from_checkpoint} is of step {result.global_step}, and the run has "
                f"{self.state.max_steps}. Raise max_steps or num_train_epochs to go on."
            )
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, except that a run resumed behind its last step does not take another one."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _save_checkpoint(self, model, trial) -> None:
        """Write the checkpoint aside and rename it when all of it is on disk: a folder called `checkpoint-N` is whole.

        Raises:
            OSError: it could not be written; earlier checkpoints are untouched.
        """
        final = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = final.parent / f".{final.name}.partial"
        try:
            with self._aside(staging):
                super()._save_checkpoint(model, trial)
            if self.weight_average is not None:
                self.weight_average.save(staging / final.name)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self._finish_checkpoint(staging / final.name, final)
        except Exception as error:  # each writer has its own error for a full disk
            shutil.rmtree(staging, ignore_errors=True)
            raise OSError(
                f"The checkpoint of step {self.state.global_step} could not be written to {final.parent}: {error}. "
                f"{shutil.disk_usage(final.parent).free / 1e6:,.1f} MB are free there. Make room or choose another "
                f"output_dir; earlier checkpoints are whole, and resume_from_checkpoint=True goes on from the last one."
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _finish_checkpoint(self, written: Path, final: Path) -> None:
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        (written / DATA_ORDER).write_text(json.dumps(self._data_order(), indent=1))
        seal(written)
        if final.exists():
            shutil.rmtree(final)
        written.rename(final)
        sync(final.parent)
        written.parent.rmdir()
        if self.args.save_total_limit:
            best = self.state.best_model_checkpoint
            delete_surplus(final.parent, self.args.save_total_limit, keep={final, *([Path(best)] if best else [])})

    def _data_order(self) -> dict[str, Any]:
        """What decides which images a step sees: a run can only be resumed where it is the same."""
        args = self.args
        order: dict[str, Any] = {
            "micro-batches of each task": self.task_pattern,
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "rows": None if self.images.is_streaming else {t: len(self.images.datasets[t]) for t in self.task_pattern},
        }
        if self.processing_class.fixed_size is not None:
            order["images per micro-batch (per_device_train_batch_size x processes)"] = (
                args.train_batch_size * args.world_size
            )
            order["gradient_accumulation_steps"] = args.gradient_accumulation_steps
            return order
        # Sizes decide who shares a micro-batch, and each process has its own.
        order["per_device_train_batch_size"] = args.train_batch_size
        order["micro-batches per step (gradient_accumulation_steps x processes)"] = (
            args.gradient_accumulation_steps * args.world_size
        )
        if len(self.task_pattern) > 1:  # all processes work on the same task
            order["processes"] = args.world_size
        return order

    def _check_data_order(self, checkpoint: Path) -> None:
        """Raises `ValueError` if going on from `checkpoint` would show some images twice and others never."""
        if not (checkpoint / DATA_ORDER).is_file() or self.args.ignore_data_skip:
            return
        before, now = json.loads((checkpoint / DATA_ORDER).read_text()), self._data_order()
        changed = [f"{name}: {value}, now {now.get(name)}" for name, value in before.items() if value != now.get(name)]
        if changed:
            raise ValueError(
                f"{checkpoint} cannot be resumed exactly, because these differ: {'; '.join(changed)}. Restore them, "
                "or pass ignore_data_skip=True to go on from these weights at the beginning of an epoch."
            )

    def _check_adapter(self, checkpoint: Path) -> None:
        """Raises `ValueError` if the weights in `checkpoint` are not of the kind that this run trains."""
        has_adapter = (checkpoint / CONFIG_NAME).is_file()
        if has_adapter != isinstance(self.model, PeftModel):
            kinds = ("an adapter", "a whole model") if has_adapter else ("a whole model", "an adapter")
            raise ValueError(
                f"{checkpoint} holds {kinds[0]}, and this run trains {kinds[1]}: "
                f"{'pass the peft_config it was made with' if has_adapter else 'leave peft_config out'}."
            )
        if has_adapter:
            before, now = PeftConfig.from_pretrained(checkpoint).to_dict(), self.model.active_peft_config.to_dict()
            changed = [name for name in before if name not in ADAPTER_NOTES and before[name] != now.get(name)]
            if changed:
                differences = "; ".join(f"{name}: {before[name]}, now {now.get(name)}" for name in changed)
                raise ValueError(
                    f"The adapter in {checkpoint} is another than this run's: {differences}. Restore them."
                )

    @contextlib.contextmanager
    def _aside(self, folder: Path):
        """Save into `folder`, from which nothing is uploaded."""
        args = self.args
        before = args.output_dir, args.push_to_hub
        args.output_dir, args.push_to_hub = str(folder), False
        try:
            yield
        finally:
            args.output_dir, args.push_to_hub = before
