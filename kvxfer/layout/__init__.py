# SPDX-License-Identifier: Apache-2.0
"""What a cache looks like: its layers, heads, blocks and memory order, and the block tables of requests."""
