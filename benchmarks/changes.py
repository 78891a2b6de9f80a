"""What a benchmark changes in an engine, in the processes of all its ranks.

Rank 0's process calls `Changes.install`; the other ranks are then started as this script, which does the same in
theirs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import random_model
from by_chance import ByChance, Table, whole_tokens

from manyheads.engine import rank, ranks


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    by_chance: bool = False
    """Whether candidates are accepted by chance (by_chance.py);"""
    acceptance: Table | None = None
    """at these rates, or at those that are published for the kind of drafter."""
    tokenizer: str | None = None
    """A folder; where no candidate is right, a token is drawn that is text by itself (`by_chance.whole_tokens`)."""
    random_folder: str | None = None
    """A folder, written by random_model.py, whose weights are made up."""

    def install(self) -> None:
        """Change the engines that this process builds from now on."""
        if self.random_folder is not None:
            random_model.install(Path(self.random_folder))
        if self.by_chance:
            ByChance(
                self.acceptance, whole_tokens(Path(self.tokenizer)) if self.tokenizer is not None else ()
            ).install()
        ranks.COMMAND = (sys.executable, __file__, msgspec.json.encode(self).decode())


if __name__ == "__main__":
    msgspec.json.decode(sys.argv[1], type=Changes).install()
    rank.main()
