"""Uploads to the Hub: what goes up, in one commit, tried again where the server is busy."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers.utils import logging

from reca_trainer.models.weights import CheckpointError
from reca_trainer.saving.card import public_name

logger = logging.get_logger(__name__)

# The files that are uploaded, by their places in the folder; all others stay on this machine.
PARTS = (
    *("sana/transformer", "sana/scheduler", "dc-ae", "internvl3", "internvl3-hf"),  # of a published OpenUni
    *("show-o", "show-o-w-clip-vit", "magvitv2", "phi-1_5", "clip-vit-large-patch14-336"),  # of a published Show-o
    *("Lance_3B", "Lance_3B_Video", "Qwen2.5-VL-ViT"),  # of a published Lance
    *("transformer", "text_encoder", "vae", "scheduler", "tokenizer", "processor"),  # of a published Qwen-Image-Edit
)
WEIGHTS = r"(adapter_model|pytorch_lora_weights|model|model_bf16|pytorch_model|diffusion_pytorch_model|ema|ae|vit)"
WEIGHTS += r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
CONFIGS = r"((adapter_|generation_|llm_|vit_|openuni_|quantization_|scheduler_)?config|ae_params|model_index)\.json"
PROCESSOR = r"((preprocessor|processor|video_preprocessor|tokenizer)_config|tokenizer|vocab|special_tokens_map)\.json"
PROCESSOR += r"|added_tokens\.json|vocab\.txt|merges\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model"
PROCESSOR += r"|chat_template\.(jinja|json)|additional_chat_templates/\w+\.jinja"
DOCUMENTS = r"README\.md|score\.md|(LICENSE|NOTICE)(\.txt|\.md)?|previews/(step-\d+|before_after)\.png"
UPLOADED = re.compile(
    rf"(({'|'.join(map(re.escape, PARTS))})/)?({WEIGHTS}|{CONFIGS}|{PROCESSOR})|openuni[\w-]*\.pth|Wan2\.2_VAE\.pth|{DOCUMENTS}"
)
RETRIED, WAITS = {429, 500, 502, 503, 504}, (1, 2, 4, 8, 16)  # status codes; seconds before each further try


def uploaded_files(folder: Path, also: Sequence[str] = ()) -> tuple[dict[str, Path], list[str]]:
    """The files of a folder that are uploaded, by name, and the names of all others. Weights as safetensors (and the
    `.pth` of OpenUni's and Lance's layouts), configs, tokenizer, processor, card, licence, scores and previews are
    uploaded. Names are relative to the folder, with forward slashes."""
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in names.items() if name in also or UPLOADED.fullmatch(name)}
    return files, [name for name in names if name not in files]


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload with reca_trainer",
    also: Sequence[str] = (),
) -> CommitInfo:
    """Upload an adapter or a model in one commit, which either is there or is not.

    Files of an interrupted upload that have arrived are not sent again. Busy or failing servers (429, 5xx) are tried again, at
    most five times. Only what belongs to a model is uploaded, see `uploaded_files`; what is left out is named in a
    warning. An error carries a note with the command that uploads the folder again.

    Args:
        folder: an adapter, a model or a trainer's `output_dir`.
        repo_id: `owner/name`; created if it is not there.
        private: visibility of a repository that is created here; by default as the owner has set it.
        revision: branch to commit to; created from `main` if it is not there.
        token: by default the one that `hf auth login` stored.
        create_pr: open a pull request instead of committing.
        also: further files to upload, by their paths in the folder.

    Raises:
        CheckpointError: the folder has no weights as safetensors.
        FileNotFoundError: a file of `also` is not there.
        PermissionError: not logged in, or no right to write there.
        ConnectionError: the Hub cannot be reached, or stopped answering.
        HfHubHTTPError: the Hub answers with another error.
        ValueError: the token cannot be one.
    """
    folder, token = Path(folder), checked_token(token)
    files, left_out = uploaded_files(folder, also)
    if missing := sorted(set(also) - files.keys()):
        raise FileNotFoundError(f"{folder} does not hold {', '.join(missing)}.")
    if not any(name.endswith(".safetensors") for name in files):
        raise CheckpointError(f"{folder} holds no .safetensors file of a model, so there is nothing to push.")
    if left_out:
        within = {name.partition("/")[0] for name in files}
        tops = {name: name.partition("/")[0] for name in left_out}
        shown = sorted({name if top == name or top in within else f"{top}/" for name, top in tops.items()})
        logger.warning_once(f"Not uploaded, being no part of a model: {', '.join(shown)}.")
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

    again = ["reca-trainer", "push", str(folder), repo_id]
    again += ["--private"] * bool(private) + ["--create_pr"] * create_pr
    again += ["--revision", revision] if revision else []
    again += ["--also", *also] if also else []
    try:
        repo_id = _make_place(api, repo_id, private, revision)
        return _retried(commit)
    except BaseException as error:
        error = _explained(error, repo_id, api.endpoint)
        error.add_note(f"{folder} is unharmed. To push it again: {shlex.join(again)}")
        raise error


def make_repo(repo_id: str, private: bool | None = None, revision: str | None = None, token: str | None = None) -> str:
    """Make sure that a repository and its branch are there and that the token may write to it, and return its whole
    name. Nothing is uploaded. Arguments and errors as for `push`."""
    api = HfApi(token=checked_token(token))
    try:
        repo_id = _make_place(api, repo_id, private, revision)
        _check_write_access(api, repo_id)
        return repo_id
    except Exception as error:
        raise _explained(error, repo_id, api.endpoint) from error.__cause__


def _make_place(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    repo_id = _retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
    if revision is not None:
        _retried(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    return repo_id


def _check_write_access(api: HfApi, repo_id: str) -> None:
    """Ask for the right to write: a token that may only read passes `create_repo` where the repository exists."""
    try:
        _retried(lambda: api.auth_check(repo_id, write=True))
    except HfHubHTTPError as error:
        if error.response.status_code != 404:  # a server that does not know the question
            raise


def checked_token(token: str | None) -> str | None:
    """A token without the white space around it.

    Raises:
        ValueError: it holds what a request's header may not; HTTP clients would show it in their errors.
    """
    if not isinstance(token, str):
        return token
    token = token.strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise ValueError("The Hub token holds characters that no token has; copy it again from hf.co/settings/tokens.")
    return token or None


def _explained(error: BaseException, repo_id: str, endpoint: str) -> BaseException:
    """What went wrong in an upload, in words that say what to do."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            explained: BaseException = PermissionError(
                f"The Hub does not let you write to {repo_id} ({status}). Log in with `hf auth login`, or pass a token "
                "with write access to it."
            )
            explained.__cause__ = error
            return explained
        if status in (409, 412):
            error.append_to_message(f"\n{repo_id} was changed by someone else during the upload; push again.")
    # An upload in a thread wraps its error.
    elif isinstance(error, HTTPError) or (isinstance(error, RuntimeError) and isinstance(error.__cause__, HTTPError)):
        explained = ConnectionError(
            f"The connection to {endpoint} failed ({error!r}). Push again: what has arrived is not sent again."
        )
        explained.__cause__ = error
        return explained
    return error


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
    is private."""
    config = json.loads(path.read_text())
    base = config.get("base_model_name_or_path")
    config["base_model_name_or_path"] = public_name(base)
    if config["base_model_name_or_path"] != base:
        logger.warning(
            f"The adapter's base model is the folder {base}, which others do not have; they must pass base_model to "
            "AutoUnifiedModel.from_pretrained."
        )
    return (json.dumps(config, indent=2) + "\n").encode()
