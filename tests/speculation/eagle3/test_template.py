"""The nodes that an EAGLE-3 drafter may guess, and how many of them its passes go on from."""

from __future__ import annotations

import pytest

from manyheads.speculation.eagle3.template import Template

CHAIN = [[0.8, 0.1]] * 4
"""The best: (), 0, 00, 000, 0000, then what stands beside them."""


@pytest.mark.parametrize(
    ("nodes", "widths"),
    [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [1, 0, 0]), (4, [1, 1, 0]), (5, [1, 1, 1]), (3.5, [1, 0.5, 0])],
)
def test_a_pass_goes_on_from_what_has_children_in_the_best_tree(nodes: float, widths: list[float]) -> None:
    assert Template(CHAIN).widths(nodes) == widths


def test_widths_grow_with_the_tree_up_to_all_that_have_children() -> None:
    template = Template([[0.5, 0.3, 0.1]] * 3)
    sizes = range(1, template.num_candidates + 2)
    for depth in range(2):
        by_size = [template.widths(nodes)[depth] for nodes in sizes]
        assert by_size == sorted(by_size)
        assert by_size[-1] == sum(len(parent) == depth + 1 for parent in template.children)
    assert template.widths(100.0) == template.widths(template.num_candidates + 1)
