# SPDX-License-Identifier: Apache-2.0
"""The control channel: sockets, connections, addresses, and how much one peer may take."""
