"""Penalties of all nodes of a step: what looks at texts alone gives what looks at the whole vocabulary does."""

from __future__ import annotations

import torch

from manyheads import SamplingParams
from manyheads.batch import RowState
from manyheads.engine.nodes import Nodes
from manyheads.engine.penalties import all_of_them, few, penalize
from manyheads.engine.state import admit
from manyheads.engine.step import Request
from manyheads.request import EngineRequest
from manyheads.speculation.tree import Tree, tree_tensors

VOCAB = 40
TREE = Tree(((), (0,), (1,), (0, 0), (0, 1), (0, 0, 0)))
PARAMS = [
    SamplingParams(repetition_penalty=1.5),
    SamplingParams(),
    SamplingParams(presence_penalty=0.5, frequency_penalty=-0.25),
    SamplingParams(repetition_penalty=0.8, presence_penalty=1.0, frequency_penalty=0.3),
]


def step() -> tuple[Nodes, RowState]:
    """Four rows, the second of which has no penalties, and a dummy row; each brings a part of a tree."""
    device = torch.device("cpu")
    state = RowState(len(PARAMS), 64, 16, 5, VOCAB, device)
    requests = []
    for row, params in enumerate(PARAMS):
        message = EngineRequest(
            request_id=str(row), prompt_token_ids=[1, 2, 3, row], params=params, output_token_ids=[7, 7, 9 + row]
        )
        requests.append(Request.from_message(message, 64, (), 3))
        requests[-1].held_row = row
    admit(state, None, requests)
    node_tokens = torch.tensor([[9, 7, 20, 7, 21, 7], [5, 6, 7, 8, 9, 10], [11, 1, 2, 1, 7, 30], [12, 7, 7, 7, 7, 7]])
    brought = [[0, 1, 3, 5], [0], [0, 1, 2, 4], [0, 1, 2, 3, 4, 5], [0]]
    node = torch.tensor([n for nodes in brought for n in nodes])
    row = torch.tensor([i for i, nodes in enumerate(brought) for _ in nodes])
    tree = tree_tensors(TREE, list(range(6)), device)
    return Nodes(
        requests=requests,
        rows=torch.tensor([0, 1, 2, 3, state.num_rows]),
        row=row,
        node=node,
        depth=tree.depth[node],
        max_depth=3,
        first=torch.zeros(5, dtype=torch.int64),
        node_tokens=torch.cat((node_tokens, torch.zeros_like(node_tokens[:1]))),
        place=torch.zeros(5, 6, dtype=torch.int64),
        tree=tree,
    ), state


def test_both_ways_are_what_the_parameters_say() -> None:
    nodes, state = step()
    logits = torch.randn(len(nodes.row), VOCAB, generator=torch.Generator().manual_seed(0))
    wanted = logits.clone()
    for i, (row, node) in enumerate(zip(nodes.row.tolist(), nodes.node.tolist(), strict=True)):
        if row == len(PARAMS):
            continue
        above = [nodes.tree.ancestors[node, other] and other > 0 for other in range(6)]
        output = [
            7,
            7,
            9 + row,
            *(int(token) for token, is_above in zip(nodes.node_tokens[row], above, strict=True) if is_above),
        ]
        params = PARAMS[row]
        for token in {1, 2, 3, row, *output}:
            x, penalty = float(logits[i, token]), params.repetition_penalty
            x = x / penalty if x > 0 else x * penalty
            count = output.count(token)
            wanted[i, token] = x - params.frequency_penalty * count - params.presence_penalty * (count > 0)
    concerned = torch.tensor([True, False, True, True, False])
    for way in (
        lambda x: few(x, nodes, state, concerned),
        lambda x: all_of_them(x, nodes, state),
        lambda x: penalize(x, nodes, state),
    ):
        found = logits.clone()
        way(found)
        torch.testing.assert_close(found, wanted)
        assert torch.equal(found[nodes.row == 1], logits[nodes.row == 1])
