# SPDX-License-Identifier: Apache-2.0
"""Command ``python -m kvxfer_transformers.serve``."""

from __future__ import annotations

import logging
import sys

from kvxfer.errors import KvxferError
from kvxfer_transformers import seams
from kvxfer_transformers.serve.options import ServeOptions


def main(arguments: list[str] | None = None) -> int:
    """Serve a model until SIGINT or SIGTERM; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        options = ServeOptions.parse(arguments)
        seams.check()
        # Heavy, and only for the right version of transformers.
        import uvicorn  # noqa: PLC0415

        from kvxfer_transformers.serve.app import make_app  # noqa: PLC0415
        from kvxfer_transformers.serve.engine import ServedEngine  # noqa: PLC0415

        engine = ServedEngine.load(options)
    except (KvxferError, ImportError, OSError, ValueError) as error:
        sys.stderr.write(f"kvxfer_transformers.serve: {error}\n")
        return 2
    try:
        uvicorn.run(
            make_app(engine),
            host=options.host,
            port=options.port,
            access_log=options.access_log,
            log_level="info",
            timeout_graceful_shutdown=options.shutdown_timeout,
        )
    finally:
        engine.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
