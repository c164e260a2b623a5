# SPDX-License-Identifier: Apache-2.0
"""How bytes move: the contract `TransferAgent`, and the agent within one process."""
