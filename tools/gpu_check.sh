#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# All that needs a GPU, in at most 8 minutes: tools/gpu_check.sh [--only STAGE] [--list] [--help]
# Another interpreter: PYTHON=/path/to/python tools/gpu_check.sh
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" -m tools.gpu_check "$@"
