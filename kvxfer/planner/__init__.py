# SPDX-License-Identifier: Apache-2.0
"""Which bytes go where: from two cache descriptions and two block tables to copies, chunks and descriptors."""
