"""`reca-trainer info`."""

from __future__ import annotations

import argparse

from reca_trainer.saving.describe import describe


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("reca-trainer info", description="Say what a checkpoint or adapter is.")
    parser.add_argument(
        "model", help="folder or Hub id, which is downloaded; owner/name/file.pth or owner/name/folder of several"
    )
    for name, value in describe(parser.parse_args(argv).model).items():
        print(f"{name:<20} {value}")
