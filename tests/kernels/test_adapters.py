"""What adapters add, by kernels, against the same token by token in float64."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from manyheads.engine.record_sizes import ROWS as RECORDED_ROWS
from manyheads.engine.record_sizes import all_rows, pass_keys
from manyheads.kernels import adapters as kernels
from manyheads.kernels import linear
from manyheads.kernels.adapters import Blocks, group
from manyheads.ops.kernel_adapters import KernelAdapters
from tests.kernels import DEVICE, INTERPRETED, TOLERANCE, relative_error
from tests.ops.test_adapters import CASES, COUNT, by_token, random_weights


def drawn(count: int, adapters: int = COUNT) -> list[int]:
    rng = random.Random(count)
    return [rng.randint(0, adapters) for _ in range(count)]


@pytest.mark.parametrize("which", [*CASES.values(), drawn(150), drawn(520), [5] * 70], ids=len)
def test_tokens_stand_in_blocks_of_one_adapter(which: list[int]) -> None:
    """Each token with an adapter in one block, in its order; what is left over are no blocks."""
    blocks = group(torch.tensor(which, device=DEVICE), COUNT)
    adapters, tokens = blocks.adapter.tolist(), blocks.token.tolist()
    num_real = sum(adapter > 0 for adapter in adapters)
    assert all(adapter == 0 for adapter in adapters[num_real:])
    found: dict[int, list[int]] = {}
    for adapter, held in zip(adapters[:num_real], tokens, strict=False):
        given = [token for token in held if token >= 0]
        assert given
        assert held == given + [-1] * (blocks.size - len(given))
        found.setdefault(adapter, []).extend(given)
    wanted = {adapter: [i for i, other in enumerate(which) if other == adapter] for adapter in set(which) - {0}}
    assert found == wanted


TYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)  # whose tl.dot multiplies bfloat16's bits


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("which", "sizes", "rank", "inputs"),
    [
        (CASES["mixed"], (16, 8, 40), 3, 32),
        (CASES["each another"], (130, 24), 16, 200),
        (CASES["many beside few"], (130,), 20, 520),
        (CASES["none"], (16,), 4, 32),
        (CASES["mixed"], (16, 24), 130, 32),
        (drawn(140), (600, 24), 8, 300),
        (drawn(515), (24,), 8, 32),
    ],
    ids=["mixed", "each another", "many beside few", "none", "of a high rank", "some", "many"],
)
def test_each_token_gets_what_its_own_adapter_adds(
    which: list[int], sizes: tuple[int, ...], rank: int, inputs: int, dtype: torch.dtype
) -> None:
    """Also into the first of a product's parts in float32."""
    weights = random_weights(sizes, rank, inputs, dtype)
    x, y = torch.randn(len(which), inputs).to(dtype), torch.randn(len(which), sum(sizes))
    added = by_token(x, which, weights)
    adapters = KernelAdapters(COUNT)
    adapters.plan(torch.tensor(which, device=DEVICE))
    on_device = type(weights)(weights.a.to(DEVICE), weights.b.to(DEVICE), sizes)
    for kind in (dtype, torch.float32):
        before = y.to(DEVICE, kind)
        found = before.clone()
        adapters.add(found, x.to(DEVICE), on_device)
        assert relative_error(found, before.double().cpu() + added) < 2 * TOLERANCE[dtype]
        untouched = torch.tensor(which, device=DEVICE) == 0
        assert torch.equal(found[untouched], before[untouched])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs programs one behind the other")
def test_sums_are_the_same_every_time() -> None:
    """The second kernel is there before the first is done, and that one before the product."""
    which = [1 + i % COUNT for i in range(64)]
    weights = random_weights((1030, 512), 16, 4096, torch.float16)
    on_device = type(weights)(weights.a.to(DEVICE), weights.b.to(DEVICE), weights.sizes)
    x, y = torch.randn(64, 4096).to(DEVICE, torch.float16), torch.randn(64, 1542).to(DEVICE, torch.float16)
    adapters = KernelAdapters(COUNT)
    adapters.plan(torch.tensor(which, device=DEVICE))
    found = [y.clone() for _ in range(200)]
    for each in found:
        adapters.add(each, x, on_device)
    assert all(torch.equal(each, found[0]) for each in found)
    assert relative_error(found[0], y.double().cpu() + by_token(x.cpu(), which, weights)) < TOLERANCE[torch.float16]


class Launches:
    """In a kernel's place: of what is launched, all that makes Triton compile it anew."""

    def __init__(self, kernel: Any) -> None:
        self.name = kernel.fn.__name__
        params = getattr(kernel, "kwargs", None) or {"do_not_specialize": kernel.do_not_specialize}
        self.names, self.plain = kernel.arg_names, params["do_not_specialize"]
        self.found: set[tuple[Any, ...]] = set()

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            given = [self._of(name, value) for name, value in zip(self.names, args, strict=False)]
            self.found.add((self.name, *given, *sorted(constants.items())))

        return launch

    def _of(self, name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):  # memory that torch gives out begins at multiples of 512 bytes
            return value.dtype, value.storage_offset() * value.itemsize % 16 == 0
        return None if name in self.plain else (value == 1, value % 16 == 0)


@pytest.mark.parametrize("most", [1, 64, 256])
@pytest.mark.parametrize("max_tokens", [32, 512, 2048])
def test_what_is_recorded_has_all_variants_that_tokens_may_need(
    most: int, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is compiled while requests wait, however many tokens of prompts and trees a step has."""
    launched = [Launches(kernel) for kernel in (kernels._group_kernel, kernels._down_kernel, kernels._up_kernel)]
    for kernel in launched:
        monkeypatch.setattr(kernels, kernel.name, kernel)

    def variants(num_tokens: int) -> None:
        for sizes, inputs in (((512, 128, 128), 512), ((512,), 512), ((1376,) * 2, 512), ((512,), 1376)):
            parts = len(sizes) == 1 and num_tokens <= linear.MAX_ROWS
            y = torch.empty(num_tokens, sum(sizes), dtype=torch.float32 if parts else torch.float16, device="meta")
            x = torch.empty(num_tokens, inputs, dtype=torch.float16, device="meta")
            a = torch.empty(COUNT, inputs, len(sizes) * 4, dtype=torch.float16, device="meta")
            b = torch.empty(COUNT * 4 * sum(sizes), dtype=torch.float16, device="meta")
            blocks: Blocks = group(torch.empty(num_tokens, dtype=torch.int64, device="meta"), COUNT)
            kernels.add(y, x, a, b, sizes, blocks)

    for rows in all_rows(most, RECORDED_ROWS):
        variants(rows)
    for (num_chunks, _), (num_trees, _) in pass_keys(most, max_tokens, 4 * most):
        variants(num_chunks + num_trees)
    recorded = [set(kernel.found) for kernel in launched]
    for num_tokens in range(1, max_tokens + 4 * most + 1):
        variants(num_tokens)
    assert [kernel.found for kernel in launched] == recorded
