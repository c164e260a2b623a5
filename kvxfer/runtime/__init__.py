# SPDX-License-Identifier: Apache-2.0
"""The two threads of an endpoint: the control loop, the data loop and what they own."""
