"""`manyheads serve` answers requests over HTTP."""

from __future__ import annotations

import argparse
import os

from manyheads.cli.extras import needs_ray
from manyheads.cli.parser import (
    Parser,
    add_answers,
    add_engine,
    add_model,
    add_option,
    answer_settings,
    engine_config,
)
from manyheads.server.config import ConnectionLimits, ServerConfig

SERVER_HELP = {
    "watchdog": (float, "seconds after which an engine that does nothing is replaced"),
    "max_restarts": (int, "engines that may die in ten minutes before the server ends"),
    "drain_timeout": (float, "seconds that running requests have after SIGTERM"),
}
CONNECTION_HELP = {
    "header_timeout": (float, "seconds in which the headers of a request must arrive"),
    "body_timeout": (float, "seconds in which a request's body must arrive, or each MiB of it"),
    "write_timeout": (float, "seconds that a client may read nothing while there is something for it"),
    "keep_alive": (int, "seconds that a connection may be idle between requests"),
    "max_connections": (int, "most open connections (default, and at most: what the limit of open files allows)"),
}


def add_commands(parser: Parser) -> None:
    """Add `manyheads serve` to the program."""
    command = parser.add_command("serve", "serve a model over HTTP", run, "manyheads serve --port 8000")
    add_model(command)
    web = command.add_argument_group("server")
    web.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all (default: 127.0.0.1)")
    web.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    web.add_argument("--api-key", help="what requests must bring (default: $MANYHEADS_API_KEY, if set)")
    web.add_argument("--protect-info", action="store_true", help="a key for /metrics, /docs and /version, too")
    web.add_argument("--ssl-certfile", metavar="FILE", help="speak HTTPS with this certificate (PEM)")
    web.add_argument("--ssl-keyfile", metavar="FILE", help="its private key, unless it is in the same file")
    web.add_argument("--root-path", default="", metavar="PATH", help="where a proxy offers the server, such as /llm")
    add_answers(web)
    web.add_argument("--cors-origin", action="append", default=[], help="origin whose pages may call; * is any")
    web.add_argument(
        "--max-body-bytes", type=int, default=ServerConfig.max_body_bytes, help="largest body (default: 4 MiB)"
    )
    web.add_argument("--access-log", action="store_true", help="log every request, without its text")
    web.add_argument("--log-format", choices=("text", "json"), default="text", help="form of the log's lines")
    for settings, texts in ((ServerConfig, SERVER_HELP), (ConnectionLimits, CONNECTION_HELP)):
        for name, (kind, text) in texts.items():
            add_option(web, name, kind, text, getattr(settings, name))
    web.add_argument("--replicas", type=int, help="engines on this machine, behind this server (needs the extra ray)")
    text = "longest time until a request starts, in seconds; who would wait longer is rejected"
    add_option(web, "max_wait", float, text, 30.0)
    web.add_argument("--verbose", action="store_true", help="tell what the engine does while it starts")
    add_engine(command)


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    config, options = engine_config(args), _server_config(args)
    if args.replicas is not None:
        with needs_ray():
            from manyheads.scale.local import serve_replicas

        return serve_replicas(config, options, args.replicas)
    from manyheads.server.run import serve

    return serve(config, options)


def _server_config(args: argparse.Namespace) -> ServerConfig:
    return ServerConfig(
        host=args.host,
        port=args.port,
        api_key=args.api_key or os.environ.get("MANYHEADS_API_KEY") or None,
        protect_info=args.protect_info,
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        root_path=args.root_path,
        cors_origins=tuple(args.cors_origin),
        max_body_bytes=args.max_body_bytes,
        connections=ConnectionLimits(**{name: getattr(args, name) for name in CONNECTION_HELP}),
        access_log=args.access_log,
        log_format=args.log_format,
        verbose=args.verbose or args.debug,
        **answer_settings(args),
        **{name: getattr(args, name) for name in SERVER_HELP},
    )
