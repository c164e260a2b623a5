# SPDX-License-Identifier: Apache-2.0
"""Spans of memory, strided copies between them, and the arrays that engines bring."""
