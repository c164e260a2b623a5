# SPDX-License-Identifier: Apache-2.0
"""Tests of the connector with vLLM's own classes and no server."""

from __future__ import annotations

import importlib
import importlib.util
import warnings

if importlib.util.find_spec("vllm") is not None:
    # Importing vLLM and torch warns of their own deprecations, which our tests would take for ours.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("vllm.v1.core.sched.scheduler")
