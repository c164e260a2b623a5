# SPDX-License-Identifier: Apache-2.0
"""Descriptions of caches: specs, axes, dtypes and block tables."""
