# SPDX-License-Identifier: Apache-2.0
"""``kvxfer bench pair``: two processes, on one machine or two, measure what a transfer between them takes."""
