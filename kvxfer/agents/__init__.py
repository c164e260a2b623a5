# SPDX-License-Identifier: Apache-2.0
"""Transport of bytes: the contract `TransferAgent`, and the agent within one process."""
