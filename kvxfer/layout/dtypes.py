# SPDX-License-Identifier: Apache-2.0
"""Element types: their sizes, which of them are converted into each other, and where they saturate."""

from __future__ import annotations

from typing import Final

DTYPE_NBYTES: Final[dict[str, int]] = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
}
"""Bytes per element of every dtype that a cache may have. Names are those of PyTorch and ml_dtypes."""

CASTABLE: Final = frozenset({"bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"})
"""Dtypes that can be converted into each other during a transfer, on request."""

CASTABLE_ON_DEVICES: Final = CASTABLE - {"float8_e5m2"}
"""Those that the adapters for devices convert; of a pair with others, one side must be in host memory."""

LARGEST: Final[dict[str, float]] = {"float16": 65504.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
"""Largest finite number of the dtypes to which a cast saturates. The other castable dtypes have the range of float32."""
