# SPDX-License-Identifier: Apache-2.0
"""Who may read which blocks until when: messages, leases, producer and consumer. Pure: no I/O, no threads."""
