# SPDX-License-Identifier: Apache-2.0
"""Leases of blocks: messages, and what producer and consumer make of them. Pure: no I/O, no threads."""
