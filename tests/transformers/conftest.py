# SPDX-License-Identifier: Apache-2.0
"""What the tests of the integration share: no test runs without transformers, and one thread computes."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module", autouse=True)
def _no_engine_stays():
    """Engines of tests that have failed are closed, too."""
    from tests.transformers import rig

    yield
    for engine in list(rig.RUNNING):
        engine.close()


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny models are slower on several threads."""
    import torch

    torch.set_num_threads(1)
