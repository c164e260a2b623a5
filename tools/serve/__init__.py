# SPDX-License-Identifier: Apache-2.0
"""A real prefill server, a real decode server and vllm-router on this machine, for tests, benchmarks and ``make serve``."""
