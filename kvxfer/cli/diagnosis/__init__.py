# SPDX-License-Identifier: Apache-2.0
"""Findings of ``kvxfer doctor``: what is installed, what the host allows, names and addresses, a running endpoint."""
