# SPDX-License-Identifier: Apache-2.0
"""The control channel: sockets, connections, and limits per peer."""
