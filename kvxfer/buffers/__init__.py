# SPDX-License-Identifier: Apache-2.0
"""How a device packs, unpacks and converts: the contract `DeviceBuffer`, and host memory."""
