# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus beside a real pair of servers: the alert rules in minutes instead of hours, and the dashboard's panels drawn."""
