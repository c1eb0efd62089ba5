"""`reca-trainer push`."""

from __future__ import annotations

import argparse

from reca_trainer.saving.hub import push


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("reca-trainer push", description="Upload an adapter or a model to the Hub.")
    parser.add_argument("folder")
    parser.add_argument("repo_id", help="owner/name")
    parser.add_argument("--private", action="store_true", default=None, help="if the repository is created")
    parser.add_argument("--revision", help="branch to commit to")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request")
    parser.add_argument("--message", default="Upload with reca_trainer", help="of the commit")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    where = {"private": args.private, "revision": args.revision, "create_pr": args.create_pr}
    commit = push(args.folder, args.repo_id, commit_message=args.message, **where)
    print(commit.pr_url or commit.commit_url)
