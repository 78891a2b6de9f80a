"""Starts a server with the fake engine: `python -m tests.server.launch FOLDER [OPTIONS]`, options of `serve`."""

from __future__ import annotations

import functools
import os
import sys
from unittest.mock import patch

from manyheads.cli import main
from manyheads.frontend.tokenizer import Tokenizer
from manyheads.request import SamplingParams
from manyheads.server import run
from tests.server.tiny_tokenizer import LightTokenizer

BUILD = "tests.server.fake_engine:build"

if __name__ == "__main__":
    if "FAKE_TOKENIZER" in os.environ:  # loading a real one takes seconds
        patch("manyheads.server.run.folders", return_value=(None, None)).start()
        patch("manyheads.server.run.default_params", return_value=SamplingParams()).start()
        patch.object(Tokenizer, "load", lambda *_: Tokenizer(LightTokenizer())).start()
    run.serve = functools.partial(run.serve, build=BUILD)
    if "--replicas" in sys.argv:  # importing Ray takes seconds
        from manyheads.scale import local

        local.replicas = functools.partial(local.replicas, build=BUILD)
    sys.exit(main(["serve", *sys.argv[1:]]))
