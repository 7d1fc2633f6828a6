"""The tiny experiment, in a folder of the test's own."""

from __future__ import annotations

import os

import pytest

import tiny_run


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no test cuts the power, and waiting for disks is slow

    def make(*overrides):
        return tiny_run.tiny(tmp_path, *overrides)

    return make
