"""Uploads to the Hub: what goes up, in one commit, tried again where the server is busy."""

from __future__ import annotations

import fnmatch
import json
import os
import time
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers.utils import logging

from reca_trainer.models.weights import CheckpointError
from reca_trainer.saving.card import public_name

logger = logging.get_logger(__name__)

# The files in a training's output that only serve to go on with it here, or may hold a token or a path.
LEFT_OUT = (
    "checkpoint-*",
    ".*",
    "runs/*",
    "logs/*",
    "wandb/*",
    "training_args.bin",
    "*.pt",
    "rng_state*",
    "trainer_state.json",
    "checkpoint_files.json",
    "data_order.json",
    "weight_average.safetensors",
)
RETRIED, WAITS = {429, 500, 502, 503, 504}, (1, 2, 4, 8, 16)  # status codes; seconds before each further try


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload with reca_trainer",
) -> CommitInfo:
    """Upload an adapter or a model in one commit, which either is there or is not.

    What of an interrupted upload has arrived is not sent again. Busy or failing servers (429, 5xx) are tried again, at
    most five times. Of a training's output neither its checkpoints nor its arguments are uploaded.

    Args:
        folder: an adapter, a model or a trainer's `output_dir`.
        repo_id: `owner/name`; created if it is not there.
        private: visibility of a repository that is created here; by default as the owner has set it.
        revision: branch to commit to; created from `main` if it is not there.
        token: by default the one that `hf auth login` stored.
        create_pr: open a pull request instead of committing.

    Raises:
        CheckpointError: the folder has no weights as safetensors.
        PermissionError: not logged in, or no right to write there.
        ConnectionError: the Hub cannot be reached, or stopped answering.
        HfHubHTTPError: what else the Hub answers.
    """
    folder = Path(folder)
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in files.items() if not any(fnmatch.fnmatch(name, left) for left in LEFT_OUT)}
    if not any(name.endswith(".safetensors") for name in files):
        raise CheckpointError(f"{folder} holds no .safetensors file, so there is nothing to push.")
    contents: dict[str, Any] = dict(files)
    if "adapter_config.json" in files:
        contents["adapter_config.json"] = _without_local_base(files["adapter_config.json"])
    api = HfApi(token=token)

    def commit() -> CommitInfo:
        # Made anew for every try: a commit empties its operations.
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )

    try:
        repo_id = _retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        if revision is not None:
            _retried(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        return _retried(commit)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PermissionError(
                f"The Hub does not let you write to {repo_id} ({status}). Log in with `hf auth login`, or pass a token "
                "with write access to it."
            ) from error
        if status in (409, 412):
            error.append_to_message(f"\n{repo_id} was changed by someone else during the upload; push again.")
        raise
    except (HTTPError, RuntimeError) as error:
        if not isinstance(error, HTTPError) and not isinstance(error.__cause__, HTTPError):
            raise  # uploads in threads wrap what went wrong
        raise ConnectionError(
            f"The connection to {api.endpoint} failed ({error!r}). Push again: what has arrived is not sent again."
        ) from error


def _retried(request: Any) -> Any:
    for wait in (*WAITS, None):
        try:
            return request()
        except HfHubHTTPError as error:
            if wait is None or error.response.status_code not in RETRIED:
                raise
            logger.warning(f"The Hub answered {error.response.status_code}; trying again in {wait} s.")
            time.sleep(wait)


def _without_local_base(path: Path) -> bytes:
    """An adapter's config with the folder of its base cut to its name: others do not have that folder, and its path
    is nobody's business."""
    config = json.loads(path.read_text())
    base = config.get("base_model_name_or_path")
    config["base_model_name_or_path"] = public_name(base)
    if config["base_model_name_or_path"] != base:
        logger.warning(
            f"The adapter's base model is the folder {base}, which others do not have; they must pass base_model to "
            "AutoUnifiedModel.from_pretrained."
        )
    return (json.dumps(config, indent=2) + "\n").encode()
