"""`manyheads serve`."""

from __future__ import annotations

import argparse
import os

from manyheads.cli.parser import engine_config


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    config = engine_config(args)
    from manyheads.server.limits import MAX_BODY_BYTES
    from manyheads.server.run import ServerConfig, serve

    return serve(
        config,
        ServerConfig(
            host=args.host,
            port=args.port,
            api_key=args.api_key or os.environ.get("MANYHEADS_API_KEY") or None,
            served_model_names=tuple(args.served_model_name),
            chat_template=args.chat_template,
            cors_origins=tuple(args.cors_origin),
            max_body_bytes=args.max_body_bytes or MAX_BODY_BYTES,
            access_log=args.access_log,
            verbose=args.verbose or args.debug,
        ),
    )
