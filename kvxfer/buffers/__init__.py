# SPDX-License-Identifier: Apache-2.0
"""Packing, unpacking and conversion on devices: the contract `DeviceBuffer`, and host memory."""
