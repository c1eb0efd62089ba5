"""`reca-trainer push`."""

from __future__ import annotations

import argparse
from pathlib import Path

from reca_trainer.saving.card import folder_card, save_card
from reca_trainer.saving.hub import push


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "reca-trainer push",
        description="Upload an adapter or a model to the Hub. Its card is README.md, written if the folder has none.",
    )
    parser.add_argument("folder")
    parser.add_argument("repo_id", help="owner/name")
    parser.add_argument("--private", action="store_true", default=None, help="make a repository that is created private")
    parser.add_argument("--revision", help="branch to commit to")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request")
    parser.add_argument("--message", default="Upload with reca_trainer", help="the commit's message")
    parser.add_argument("--also", nargs="+", default=(), metavar="FILE", help="further files of the folder to upload")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    folder = Path(args.folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} on this machine.")
    if not (folder / "README.md").exists():
        save_card(folder_card(folder, args.repo_id), folder / "README.md")
    where = {"private": args.private, "revision": args.revision, "create_pr": args.create_pr}
    commit = push(folder, args.repo_id, commit_message=args.message, also=args.also, **where)
    print(commit.pr_url or commit.commit_url)
