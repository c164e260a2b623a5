# SPDX-License-Identifier: Apache-2.0
"""Questions and answers of ``kvxfer plan``: sides in words, models, forecasts and the report."""
