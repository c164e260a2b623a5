# SPDX-License-Identifier: Apache-2.0
"""Transfer plans: which bytes go where, in which chunks, by which route."""
