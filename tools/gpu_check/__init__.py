# SPDX-License-Identifier: Apache-2.0
"""Tests and benchmarks that need a GPU, in one command with limits of time: `tools/gpu_check.sh`.

It runs from the source tree on a machine without network and without vLLM. What a stage needs and is not there is named, and the
stage is skipped. Nothing here imports kvxfer or another package, so that this holds for kvxfer's own requirements, too.
"""
