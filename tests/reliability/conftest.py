"""The server that training processes are forked from does its imports before anything is measured."""

import pytest

from tests.reliability.run import fork


@pytest.fixture(scope="session", autouse=True)
def _imports_are_done():
    fork(print).join()
