"""Acceptance by a table: what the engine counts is what the table says, by depth, of every kind of drafter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from manyheads.engine import recorded, runner
from manyheads.engine.runner import Runner
from manyheads.models.registry import read_config
from manyheads.request import EngineRequest, SamplingParams
from manyheads.speculation.eagle3.drafter import Eagle3Drafter
from manyheads.speculation.medusa.drafter import MedusaDrafter
from tests.eagle3 import make_drafter
from tests.engine.test_exactness import engine
from tests.engine.test_graphs import record
from tests.tiny import save_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import by_chance

VOCAB = 512
"""So many tokens that one that is no candidate is hardly ever taken for one."""
TABLE = [[0.6, 0.2, 0.1], [0.5, 0.3], [0.6, 0.2]]


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `install` replaces is put back."""
    for owner, name in (
        (MedusaDrafter, "propose"),
        (MedusaDrafter, "attach"),
        (Eagle3Drafter, "_offer"),
        (Eagle3Drafter, "attach"),
        (by_chance.medusa, "read_heads"),
        (by_chance.eagle3, "read_drafter"),
        (recorded, "draw"),
        (runner, "draw"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.mark.parametrize("is_recorded", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("kind", by_chance.KINDS)
@pytest.mark.usefixtures("restored")
def test_candidates_are_right_as_often_as_the_table_says(tmp_path: Path, kind: str, is_recorded: bool) -> None:
    save_model(tmp_path, vocab_size=VOCAB)
    heads = tmp_path / "heads"
    if kind == "eagle3":
        heads = tmp_path / "drafter"
        make_drafter(heads, read_config(tmp_path))
    by_chance.ByChance(TABLE).install()
    served = engine(tmp_path, 10, heads=str(heads), num_blocks=300, max_num_batched_tokens=64)
    assert served.ready.drafter == kind
    if is_recorded:
        record(served)
    for i in range(24):
        params = SamplingParams(temperature=1.0, seed=i, max_tokens=80)
        served.add_request(EngineRequest(request_id=str(i), prompt_token_ids=[i, 3, 5], params=params))
    while served.has_work():
        served.step()
    planner = served.planner
    learnt = planner.acceptance.table()
    assert isinstance(served.runner, Runner)
    for depth, rates in enumerate(TABLE):
        assert learnt[depth][: len(rates)] == pytest.approx(rates, abs=0.12), depth
    stats = served.stats()
    assert stats.accepted_by_depth[0] / stats.drafted_by_depth[0] > 0.8  # all three ranks together hold for 0.9


def test_tables(tmp_path: Path) -> None:
    eagle3 = by_chance.table_of("eagle3")
    assert by_chance.chain_rates(eagle3, 5) == pytest.approx(by_chance.CHAIN)
    assert all(sum(ranks) <= 1 for ranks in eagle3)
    assert by_chance.chain_rates(by_chance.table_of("medusa"), 3) == pytest.approx([0.56, 0.30, 0.16], abs=0.01)
    file = tmp_path / "table.json"
    file.write_text(json.dumps(TABLE))
    assert by_chance.table_of("eagle3", file) == TABLE
    assert by_chance.chain_rates(TABLE, 5) == pytest.approx([0.6, 0.3, 0.18, 0.108, 0.0648])
    file.write_text("[[0.7, 0.4]]")
    with pytest.raises(ValueError, match="each of which adds up to 1 at most"):
        by_chance.table_of("eagle3", file)
