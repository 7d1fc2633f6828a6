"""The tiny experiment, in a folder of the test's own."""

from __future__ import annotations

import pytest

import tiny_run


@pytest.fixture
def tiny(tmp_path):
    def make(*overrides):
        return tiny_run.tiny(tmp_path, *overrides)

    return make
