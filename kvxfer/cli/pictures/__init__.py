# SPDX-License-Identifier: Apache-2.0
"""Pictures of ``kvxfer plan``: which bytes go where."""
