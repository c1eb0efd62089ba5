"""Every test that the table of options names fails where its option keeps the default, so it does observe the option."""

import os
import subprocess
import sys

import pytest

from tests.test_options import COMMAND_LINE_MODEL, ROOT, RUN, Works

pytestmark = pytest.mark.slow

# What each Python process of a test imports first, so that nobody's value for the option arrives.
WITHOUT = """
from functools import wraps

from reca_trainer import RecAConfig
from reca_trainer.cli.train import ModelArguments


def without(init):
    @wraps(init)
    def call(self, *args, **options):
        init(self, *args, **{{name: value for name, value in options.items() if name != {name!r}}})

    return call


for options in (RecAConfig, ModelArguments):
    options.__init__ = without(options.__init__)
"""
NAMED = {name: entry.test for name, entry in (RUN | COMMAND_LINE_MODEL).items() if isinstance(entry, Works)}
NAMED = {name: test for name, test in NAMED.items() if "[" not in test}  # cases compare with the default themselves


@pytest.mark.parametrize("name", NAMED)
def test_a_named_test_fails_with_the_default(name, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(name=name))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'run'}", NAMED[name]]
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-4000:]
