"""A run's checkpoints: whole or known not to be, and resumed exactly or refused."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import peft
import torch
import transformers
import xxhash
from accelerate.utils import broadcast_object_list
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from torch.distributed.fsdp import StateDictType
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import logging

import reca_trainer
from reca_trainer import adapters
from reca_trainer.data.instructions import CAPTION_QUESTIONS, INSTRUCTIONS
from reca_trainer.data.streaming import StreamingBatches
from reca_trainer.files import give_usual_rights, sync
from reca_trainer.interruption import Interrupted, Interruption
from reca_trainer.saving.shards import check_shards

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

SEAL = "checkpoint_files.json"
LOCK = ".lock"
CHUNK = 1 << 24  # bytes of a file that are in memory at a time
SAMPLE = 64  # values of each frozen tensor that stand for all of it
# Entries of an adapter's configuration that do not decide how it computes.
ADAPTER_NOTES = {
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "init_lora_weights",
    "auto_mapping",
}
# Arguments that decide the next step, whatever the data.
ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "optim",
    "optim_args",
    "optim_target_modules",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "fp16",
    "tf32",
    "neftune_noise_alpha",
    "ema_decay",
    "freeze_modules",
    "instruction_dropout",
    "caption_dropout",
    "edit_source_dropout",
    "condition_token_dropout",
    "token_weighting",
    "timesteps_per_image",
    "max_image_size",
    "min_image_size",
)
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
WITHOUT_LENGTH = (*WITHOUT_WARMUP, "constant_with_warmup", "inverse_sqrt")
NEW_RUN = "start a new run from these weights: pass the checkpoint's folder as the model"


# --- a run's folder ---


def make_output_dir(args: TrainingArguments) -> None:
    """Called by all processes of a run.

    Raises:
        OSError: nothing can be written in `args.output_dir`.
        BlockingIOError: another run writes there.
    """
    path = args.output_dir
    try:
        os.makedirs(path, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    except OSError as error:
        raise OSError(f"Nothing can be saved in output_dir={str(path)!r}: {error}. Choose another folder.") from error
    by_main_process(args, lambda: _enter_and_leave(path))


def _enter_and_leave(output_dir: str) -> None:
    with sole_run(output_dir):
        pass


@contextlib.contextmanager
def sole_run(output_dir: str | os.PathLike) -> Iterator[None]:
    """A context that one process at a time can be in for a folder. A process that dies leaves it. Readers need no lock.

    Raises:
        BlockingIOError: another run is in there.
    """
    with open(Path(output_dir) / LOCK, "a+") as file:
        _lock(file, output_dir)
        _locked.add(file)
        try:
            yield
        finally:
            _locked.discard(file)


def _lock(file: IO[str], output_dir: str | os.PathLike) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise BlockingIOError(
            f"Another run ({file.read()}) writes to output_dir={str(output_dir)!r}. Choose another folder, or wait until "
            "it has ended."
        ) from None
    except OSError as error:
        logger.warning(f"output_dir={str(output_dir)!r} cannot be locked ({error}): no other run may write there.")
        return
    with contextlib.suppress(OSError):  # a full disk has room for the lock and not for its holder's name
        file.truncate(0)
        # Not through the file's buffer: closing it would try again, and fail.
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())


_locked: set[IO[str]] = set()


def _close_locked() -> None:
    for file in _locked:
        file.close()


if hasattr(os, "register_at_fork"):
    # Loading workers outlive a killed run by seconds, and must not keep its lock meanwhile.
    os.register_at_fork(after_in_child=_close_locked)


def by_main_process(args: TrainingArguments, action: Callable[[], Any]) -> Any:
    """Call `action` on the main process alone; what it returns or raises there, all processes return or raise."""
    outcome: list[Any] = [None, None]
    if args.process_index == 0:
        try:
            outcome[0] = action()
        except (OSError, RuntimeError, ValueError) as error:
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result


# --- whole or not ---


def digest_of(path: Path) -> str:
    """The digest of a file's contents (XXH3, 128 bits), which is fast enough for hundreds of gigabytes."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of_entries(entries: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(entries, indent=1).encode())


def seal(folder: Path, **entries: Any) -> None:
    """Put everything in a checkpoint on disk, and write down what belongs to it, beside `entries`."""
    give_usual_rights(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    for path in files:
        sync(path)
    entries["bytes"] = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    entries["digests"] = {str(path.relative_to(folder)): digest_of(path) for path in files}
    (folder / SEAL).write_text(json.dumps({"digest": digest_of_entries(entries), **entries}, indent=1))
    sync(folder / SEAL)
    sync(folder)


def read_seal(folder: Path) -> dict[str, Any]:
    """The entries of a checkpoint's seal.

    Raises:
        ValueError: there is none, it is damaged, or it names a file that is missing or has another length.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no checkpoint at {folder}.")
    if not (folder / SEAL).is_file():
        raise ValueError(f"{folder} is not complete: it has no {SEAL}, which is written last.")
    try:
        entries = json.loads((folder / SEAL).read_text())
        intact = entries.pop("digest") == digest_of_entries(entries)
    except (ValueError, TypeError, KeyError, AttributeError):
        intact = False
    if not intact:
        raise ValueError(f"{folder} is not complete: its {SEAL} is damaged.")
    for name, size in entries["bytes"].items():
        path = folder / name
        length = path.stat().st_size if path.is_file() else None
        if length != size:
            raise ValueError(f"{folder} is not complete: {name} should have {size} bytes and has {length or 'none'}.")
    return entries


def check_complete(folder: Path) -> dict[str, Any]:
    """Reads all of a checkpoint; returns the entries of its seal.

    Raises:
        ValueError: naming the first of its files that is missing or not as it was written.
    """
    entries = read_seal(folder)
    for name, digest in entries["digests"].items():
        if digest_of(folder / name) != digest:
            raise ValueError(f"{folder} is damaged: {name} has changed since it was written.")
    return entries


def checkpoints(output_dir: str | os.PathLike) -> tuple[list[Path], dict[Path, str]]:
    """Those whose files have their lengths, oldest first, and what is wrong with each of the others.

    Each has a number of its own, one higher than any that lay there when it was written. Neither clocks nor steps tell
    the order: clocks are set back, and a run that starts anew has lower steps than what the last one left.
    """
    whole, damaged = {}, {}
    for path in sorted(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        if path.name.rpartition("-")[2].isdigit():
            try:
                entries = read_seal(path)
                whole[path] = entries["number"], entries["step"]
            except ValueError as error:
                damaged[path] = str(error)
    return sorted(whole, key=whole.__getitem__), damaged


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint that is as it was written; those that are not are named in a warning."""
    candidates, damaged = checkpoints(output_dir)
    for problem in damaged.values():
        logger.warning(f"{problem} Looking for another one.")
    for path in reversed(candidates):
        try:
            check_complete(path)
            return str(path)
        except ValueError as error:
            logger.warning(f"{error} Looking for another one.")
    return None


def delete_surplus(output_dir: Path, limit: int, keep: set[Path]) -> None:
    """Delete all but `limit` checkpoints: those that are not whole before the others, then the oldest; none of `keep`."""
    whole, damaged = checkpoints(output_dir)
    deletable = [path for path in [*damaged, *whole] if path not in keep]
    for path in deletable[: max(0, len(whole) + len(damaged) - limit)]:
        shutil.rmtree(path)


# --- the same run or not ---


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The entries of `before` that have another value now."""
    return [f"{name}: {value}, now {now.get(name)}" for name, value in before.items() if value != now.get(name)]


def frozen_digest(model: torch.nn.Module) -> str:
    """The digest of a sample of each frozen tensor. No checkpoint of an adapter holds them, and together they may have many
    gigabytes."""
    digest = xxhash.xxh3_128()
    for weight in model.parameters():
        if not (weight.requires_grad or weight.is_meta or isinstance(weight, DTensor)):
            values = weight.detach().reshape(-1)
            sample = values[:: max(1, len(values) // SAMPLE)].cpu().contiguous()
            digest.update(f"{weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(sample.view(torch.uint8).numpy())
    return digest.hexdigest()


def weight_dtypes(model: torch.nn.Module, trained: bool) -> dict[str, int]:
    """How many values have each dtype, of the trained or the frozen weights."""
    counts: dict[str, int] = {}
    for weight in model.parameters():
        if weight.requires_grad == trained:
            dtype = str(weight.dtype).removeprefix("torch.")
            counts[dtype] = counts.get(dtype, 0) + getattr(weight, "ds_numel", weight.numel())  # ZeRO-3 empties them
    return counts


class RunCheckpoints(Trainer if TYPE_CHECKING else object):
    """The part of `RecATrainer` that writes checkpoints and goes on from them."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        optimizer, schedule = self.optimizer, self.lr_scheduler
        made_from = self.optimizer_cls_and_kwargs
        self._passed = {
            "optimizer_cls_and_kwargs": made_from and f"{made_from[0].__name__} {made_from[1]}",
            "the optimizer passed": optimizer and f"{type(optimizer).__name__} {optimizer.defaults}",
            "the schedule passed": schedule and type(schedule).__name__,
        }
        self._settings: dict[str, Any] = {}
        self._frozen: str | None = None
        self._stream: StreamingBatches | None = None
        self._stream_state: dict[str, Any] | None = None  # behind the last step, in a run that has fetched the next
        self.interruption, self._interrupted = Interruption(), False
        # Step of the last checkpoint, and the `resume_from_checkpoint` that goes on from it.
        self._saved: tuple[int, str | bool | None] = (0, None)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """As `Trainer.train`, and alone in `output_dir`. `resume_from_checkpoint=True` goes on from the newest complete
        checkpoint there, or starts from the beginning, with a warning, if there is none; by default it is that of the
        arguments.

        Raises:
            BlockingIOError: another run writes to `output_dir`.
            KeyboardInterrupt, SystemExit: the run was told to stop, and has written a checkpoint.
            ValueError: the checkpoint is damaged, holds weights only, or is of a run that goes on differently.
        """
        args = self.args
        if resume_from_checkpoint is None:
            resume_from_checkpoint = args.resume_from_checkpoint
        if str(resume_from_checkpoint).lower() in ("true", "false"):  # of a command line
            resume_from_checkpoint = str(resume_from_checkpoint).lower() == "true"
        if args.save_only_model and args.save_strategy != SaveStrategy.NO:
            logger.warning(
                "save_only_model=True leaves the state of optimizer, schedule and random numbers out of checkpoints, so "
                "none of them can be resumed. A run that is interrupted starts again."
            )
        with contextlib.ExitStack() as stack:
            by_main_process(args, lambda: stack.enter_context(sole_run(args.output_dir)))
            checkpoint = by_main_process(args, lambda: self._find_checkpoint(resume_from_checkpoint))
            self._settings = self._run_settings()
            first_step = 0
            if checkpoint is not None:
                first_step = by_main_process(args, lambda: read_seal(Path(checkpoint))["step"])
                steps = self._planned_steps()
                by_main_process(args, lambda: self._check_same_run(Path(checkpoint), steps))
            if self.is_world_process_zero():
                for abandoned in Path(args.output_dir).glob(f".{PREFIX_CHECKPOINT_DIR}-*.partial"):
                    shutil.rmtree(abandoned)
            self.resumed_from, self._saved = checkpoint, (first_step, checkpoint)
            self.interruption.signal, self._interrupted = None, False
            try:
                result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
            except Interrupted:
                self._end_interrupted()
        if result.global_step == first_step:
            logger.warning(
                f"Nothing was trained: {checkpoint} is of step {result.global_step}, and the run has "
                f"{self.state.max_steps}. Raise max_steps or num_train_epochs to go on."
            )
        return result

    def _end_interrupted(self) -> NoReturn:
        """Leave a checkpoint of the last step and a message that says how to go on from it. A resumed run leaves none before
        its first step: its random numbers and streams do not yet stand where they stood in the checkpoint.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
            SystemExit: with the status 143, as after SIGTERM.
        """
        args, step = self.args, self.state.global_step
        saves = step > 0 and args.save_strategy != SaveStrategy.NO
        self._interrupted = True
        if saves and self._saved[0] != step:
            self._save_checkpoint(self.model_wrapped, trial=None)
        saved_step, checkpoint = self._saved
        if not step:
            advice = "Nothing was trained."
        elif saved_step != step:
            advice = "There is no checkpoint of it."
        elif args.save_only_model and checkpoint is True:
            advice = f"It was saved with save_only_model=True: you can {NEW_RUN}."
        else:
            word = "true" if checkpoint is True else checkpoint
            advice = f"To go on, start it again with resume_from_checkpoint={checkpoint!r} (on the command line: "
            advice += f"--resume_from_checkpoint {word})."
        cause = self.interruption.cause or "another of its processes was told to stop"
        message = f"The run ended after step {step} of {self.state.max_steps}, because {cause}. {advice}"
        logger.warning(message)
        if self.interruption.signal == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise SystemExit(128 + signal.SIGTERM)

    def _find_checkpoint(self, resume_from_checkpoint: str | os.PathLike | bool | None) -> str | None:
        if resume_from_checkpoint is True:
            checkpoint = last_complete_checkpoint(self.args.output_dir)
            if checkpoint is None:
                logger.warning(f"There is no checkpoint in {self.args.output_dir} to resume from; starting anew.")
            return checkpoint
        if not resume_from_checkpoint:
            return None
        try:
            check_complete(Path(resume_from_checkpoint))
        except ValueError as error:
            raise ValueError(
                f"{error} resume_from_checkpoint=True goes on from the newest in output_dir that is whole."
            ) from error
        return str(resume_from_checkpoint)

    def get_batch_samples(self, *args: Any, **kwargs: Any):
        """As in `Trainer`; a run that is interrupted before the step goes back behind the one before."""
        self._stream_state = None if self._stream is None else self._stream.state_dict()
        return super().get_batch_samples(*args, **kwargs)

    @property
    def _stream_file(self) -> str:
        """Where the stream of this process stands; each has its own rows."""
        return f"stream-{self.args.process_index}.json"

    def follow_stream(self, stream: StreamingBatches) -> None:
        """Write down in every checkpoint where a stream stands. In a resumed run it goes on from there."""
        self._stream = stream
        if self.resumed_from and not self.args.ignore_data_skip:
            stream.load_state_dict(json.loads((Path(self.resumed_from) / self._stream_file).read_text()))

    def _planned_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, except that a run resumed behind its last step does not take another one, and that it may be
        told to stop."""
        if self.state.global_step < self.state.max_steps:
            with self.interruption.watched():
                super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`, which writes no model where FSDP's checkpoints are sharded."""
        with contextlib.ExitStack() as stack:
            if self.is_fsdp_enabled:
                plugin = self.accelerator.state.fsdp_plugin
                stack.callback(setattr, plugin, "state_dict_type", plugin.state_dict_type)
                plugin.state_dict_type = StateDictType.FULL_STATE_DICT
            super().save_model(output_dir, _internal_call)

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
            if self.state.best_model_checkpoint == str(staging / final.name):  # which every process reads at the end
                self.state.best_model_checkpoint = str(final)
            if self.weight_average is not None:
                self.weight_average.save(staging / final.name)
            if self._stream is not None:
                state = self._stream_state if self._interrupted else self._stream.state_dict()
                (staging / final.name / self._stream_file).write_text(json.dumps(state))
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
        self._saved = self.state.global_step, True
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _finish_checkpoint(self, written: Path, final: Path) -> None:
        if self.state.best_model_checkpoint == str(final):
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        whole, _ = checkpoints(final.parent)
        seal(
            written,
            number=1 + max((read_seal(path)["number"] for path in whole), default=0),
            step=self.state.global_step,
            weights_only=self.args.save_only_model,
            schedule=self._schedule(self.state.max_steps),
            **self._settings,
        )
        if final.exists():
            shutil.rmtree(final)
        written.rename(final)
        sync(final.parent)
        written.parent.rmdir()
        if self.args.save_total_limit:
            best = self.state.best_model_checkpoint
            delete_surplus(final.parent, self.args.save_total_limit, keep={final, *([Path(best)] if best else [])})

    # --- what decides the next step ---

    def _run_settings(self) -> dict[str, dict[str, Any]]:
        """All of it but the schedule, as JSON gives it back; taken before the model is wrapped or sharded."""
        args, base = self.args, adapters.unwrap(self.model)
        if self._frozen is None:
            self._frozen = frozen_digest(self.model)
        reconstruct = args.read_instructions() or list(INSTRUCTIONS)
        has_dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in self.model.modules())
        training = {
            **{name: getattr(args, name) for name in ARGUMENTS},
            **self._passed,
            "loss weights": self.loss_weights,
            "instructions": f"{len(reconstruct)}, digest {digest_of_entries(reconstruct)}",
            "caption questions": f"{len(CAPTION_QUESTIONS)}, digest {digest_of_entries(CAPTION_QUESTIONS)}",
            "FSDP's state dict": self.accelerator.state.fsdp_plugin.state_dict_type.name if self.is_fsdp_enabled else None,
            "trained weights": weight_dtypes(self.model, trained=True),
            "frozen weights": weight_dtypes(self.model, trained=False),
            "digest of frozen weights": self._frozen,
            "processes, each with its own dropout": args.world_size if has_dropout else None,
            **{f"processor's {name}": value for name, value in self.processing_class.to_dict().items()},
        }
        rounding = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "reca_trainer": reca_trainer.__version__,
            "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type,
            "attention": getattr(base.config, "_attn_implementation", None),
            "torch_compile": args.torch_compile,
        }
        settings = {"data": self._data_order(), "training": training, "rounding": rounding}
        return json.loads(json.dumps(settings, default=str))

    def _schedule(self, steps: int) -> dict[str, int]:
        return {"warm-up steps": self.args.get_warmup_steps(steps), "steps that the schedule spans": steps}

    def _schedule_differences(self, before: dict[str, int], steps: int, step: int) -> list[str]:
        """`step`: that of the checkpoint. A warm-up that is over either way, before a constant rate, makes none."""
        kind, now = self.args.lr_scheduler_type, self._schedule(steps)
        if self._passed["the schedule passed"]:
            return []
        changed = differences(before, now)
        warmups = [schedule["warm-up steps"] for schedule in (before, now)]
        if kind in WITHOUT_WARMUP or (kind == "constant_with_warmup" and step >= max(warmups)):
            changed = [entry for entry in changed if not entry.startswith("warm-up steps")]
        if kind in WITHOUT_LENGTH:
            changed = [entry for entry in changed if not entry.startswith("steps that")]
        return changed

    def _data_order(self) -> dict[str, Any]:
        """What decides which images a step sees: a run can only be resumed where it is the same."""
        args = self.args
        order: dict[str, Any] = {
            "micro-batches of each task": self.task_pattern,
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "rows": None
            if self.images.is_streaming
            else {t: len(self.images.datasets[t]) for t in self.task_pattern},
            "columns": {task: self.images.columns[task] for task in self.task_pattern},
            "seed of the rows held out": args.seed if args.eval_size else None,
            "dataloader_drop_last": args.dataloader_drop_last,
            "cache_latents": args.cache_latents,  # keeps images at their own sizes
        }
        if self.images.is_streaming:
            order["shards"] = {t: getattr(self.images.datasets[t], "num_shards", None) for t in self.task_pattern}
            order[
                "readers of the stream (processes x dataloader_num_workers), who divide its shards: with others, rows would "
                "come twice or never"
            ] = f"{args.world_size} x {max(args.dataloader_num_workers, 1)}"
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

    def _check_same_run(self, checkpoint: Path, steps: int) -> None:
        """Raises `ValueError` if a run of `steps` steps would not go on from `checkpoint` as the one that wrote it."""
        check_shards(checkpoint)
        written = read_seal(checkpoint)
        if written["weights_only"]:
            raise ValueError(
                f"{checkpoint} cannot be resumed: it was written with save_only_model=True, so optimizer and schedule "
                f"would start again. You can {NEW_RUN}."
            )
        changed = differences(written["training"], self._settings["training"])
        changed += self._schedule_differences(written["schedule"], steps, written["step"])
        changed += self._adapter_differences(checkpoint)
        data = [] if self.args.ignore_data_skip else differences(written["data"], self._settings["data"])
        if changed or data:
            wayout = "pass ignore_data_skip=True to go on from these weights at the beginning of an epoch"
            raise ValueError(
                f"{checkpoint} cannot be resumed exactly, because these differ: {'; '.join(data + changed)}. Restore "
                f"them, or {NEW_RUN if changed else wayout}."
            )
        if changed := differences(written["rounding"], self._settings["rounding"]):
            logger.warning(
                f"{checkpoint} was written elsewhere or with other versions ({'; '.join(changed)}); the next steps may "
                "round otherwise."
            )

    def _adapter_differences(self, checkpoint: Path) -> list[str]:
        """Raises `ValueError` if the weights in `checkpoint` are not of the kind that this run trains."""
        has_adapter = (checkpoint / CONFIG_NAME).is_file()
        if has_adapter != isinstance(self.model, PeftModel):
            kinds = ("an adapter", "a whole model") if has_adapter else ("a whole model", "an adapter")
            raise ValueError(
                f"{checkpoint} holds {kinds[0]}, and this run trains {kinds[1]}: "
                f"{'pass the peft_config it was made with' if has_adapter else 'leave peft_config out'}."
            )
        if not has_adapter:
            return []
        before, now = PeftConfig.from_pretrained(checkpoint).to_dict(), self.model.active_peft_config.to_dict()
        return differences({name: value for name, value in before.items() if name not in ADAPTER_NOTES}, now)

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
