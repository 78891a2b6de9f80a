"""The seam for devices: every operation that a device may do in its own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from manyheads.attention.base import AttentionBackend, Heads
from manyheads.batch import Gained, Guesses, Level, OpenNodes, Outcome, RowState, Trees, TreeTensors
from manyheads.kv_cache import KVCache
from manyheads.ops.adapters import Adapters
from manyheads.quantization.base import CodedScheme, Weight

if TYPE_CHECKING:
    from manyheads.kernels.rows import QuantizedRows

    Rows = Tensor | QuantizedRows
    """Rows of activations [T, D]: as they are, or in 8 bits for the product that comes next."""


def rows_at(x: Rows, rows: Tensor) -> Rows:
    """Some of the rows, by their numbers: [N] int64."""
    return x[rows] if isinstance(x, Tensor) else x.at(rows)


class Product(ABC):
    """x Wᵀ + b, with one weight in the form that a device multiplies with. One class a form.

    Args:
        shape: (out, in) of the weight.
        bias: [out] or None.
        nbytes: what the weight takes in this form.
    """

    can_be_captured = True
    """Whether a CUDA graph may hold it."""
    plain: Tensor | None = None
    """The weight itself, where it is kept as it came; None where it was brought into another form."""

    def __init__(self, shape: tuple[int, ...], bias: Tensor | None, nbytes: int) -> None:
        self.out_features, self.in_features = shape
        self.bias = bias
        self.nbytes = nbytes + (bias.nbytes if bias is not None else 0)
        """What it keeps, in bytes."""

    @abstractmethod
    def __call__(self, x: Any) -> Tensor:
        """[T, in] (`Rows`, if it `takes` them) → [T, out]."""

    def parts(self, x: Any) -> Tensor:
        """The product where it is added to something next: [T, out], or parts of it, [splits, T, out] float32."""
        return self(x)

    def takes(self, x: Tensor) -> CodedScheme | None:
        """The scheme that whoever computes its rows may quantize them for; None: they come as they are.

        Args:
            x: of the rows' dtype and device.
        """
        return None

    def _biased(self, y: Tensor) -> Tensor:
        """The bias added to a result in place."""
        return y if self.bias is None else y.add_(self.bias)


class GroupedProduct(ABC):
    """x Wᵀ + b of tokens, with the weights and biases of their experts. One class a form.

    Args:
        nbytes: what the weights take in this form.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        """What it keeps, in bytes."""

    @abstractmethod
    def __call__(self, x: Tensor, routed: Any) -> Tensor:
        """[T, in] → [T · K, out], of the pairs by their experts.

        Args:
            routed: what `Ops.route` of the same device gave.
        """

    @abstractmethod
    def added(self, x: Any, routed: Any) -> Tensor:
        """What the experts say of each token, by their chances, one added to the other.

        Args:
            x: [T · K, in] (`Rows`, if it `takes` them), of the pairs by their experts.
            routed: what `Ops.route` of the same device gave.

        Returns:
            [T, out], or parts of it, [K, T, out] float32 that are to be added up.
        """

    def takes(self, x: Tensor) -> CodedScheme | None:
        """The scheme that whoever computes rows for `added` may quantize them for; as `Product.takes`."""
        return None


class Ops(Protocol):
    """What a device must do beside torch's plain operations. Nothing here waits for the device, where it has kernels.

    `TorchOps` says in torch what every implementation computes.
    """

    records: bool
    """Whether a step can be recorded once and replayed (CUDA graphs)."""
    noise_bytes: int
    """What `draw` takes for each number of its noise while it makes it."""
    cutoff_bytes: int
    """What `cutoff` takes for each logit."""
    library_bytes: int
    """What the libraries behind the operations take of the device for themselves."""
    widened_rows: int
    """Most rows of a quantized weight that are there in floating point while it is multiplied with many tokens."""
    gathers_pages: bool
    """Whether attention copies a layer's pages together and makes masks, which takes memory."""

    def watch(self, tell: Callable[[str], None]) -> None:
        """Call this with the name of whatever is compiled from now on, which holds up the step that needs it."""

    def attention(self, cache: KVCache, heads: Heads) -> AttentionBackend:
        """Attention of a model's heads over a cache."""

    def product(self, weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> Product:
        """The product with a weight [out, in] and a bias [out], in the form that serves best here.

        Args:
            dtype: of the activations, which a quantized weight that nothing multiplies is widened to.
        """

    def grouped(self, weights: Sequence[Weight], bias: Tensor | None, dtype: torch.dtype) -> GroupedProduct:
        """The product with the weights of a layer's experts, [out, in] each.

        Args:
            bias: [experts · out], the experts' one behind the other, or None.
            dtype: as `product` has it.
        """

    def route(self, x: Tensor, router: Tensor, bias: Tensor | None, top: int, adds_up: bool) -> Any:
        """Choose experts for tokens: the most probable ones by the softmax of x · routerᵀ + bias.

        Args:
            x: [T, hidden]
            router: [experts, hidden]
            bias: [experts] or None.
            top: K, how many each token goes to.
            adds_up: whether the chances of those that are chosen are made to add up to 1.

        Returns:
            A `Routed` (`ops/experts.py`), for the grouped products of this device.
        """

    def adapters(self, count: int) -> Adapters:
        """What so many adapters add to the products of a model."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm of [T, D], its statistics in float32 (Zhang and Sennrich 2019)."""

    def norm_pairs(
        self,
        first: Tensor,
        first_at: Tensor | None,
        first_weight: Tensor,
        second: Tensor,
        second_at: Tensor | None,
        second_weight: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """RMSNorm of rows of two tensors, side by side.

        Args:
            first, second: [rows, D] each.
            first_at, second_at: [T] int64, which rows; None for all, in order.

        Returns:
            [T, 2 · D], and [T, D], the second one's rows as they are, which may be that tensor itself.
        """

    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        scheme: CodedScheme | None = None,
        multiplier: float = 1.0,
    ) -> Any:
        """Add x to the residual [T, D] in place, and norm the sum. x may be in parts (`Product.parts`).

        Args:
            scheme: what the product that comes next `takes`; None is a plain tensor.
            multiplier: of x.

        Returns:
            `Rows`.
        """

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """LayerNorm of [T, D], its statistics in float32 (Ba et al. 2016)."""

    def add_layer_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        scheme: CodedScheme | None = None,
        multiplier: float = 1.0,
    ) -> Any:
        """`add_rms_norm` with the other norm."""

    def silu_mul(self, gate_up: Tensor, scheme: CodedScheme | None = None) -> Any:
        """silu(gate) · up: [T, 2 · I] → [T, I]; for the product that comes next as `add_rms_norm`."""

    def gelu_mul(self, gate_up: Tensor, scheme: CodedScheme | None = None) -> Any:
        """gelu(gate) · up, by its approximation with tanh (Hendrycks and Gimpel 2016); shapes as `silu_mul`'s."""

    def clamped_swiglu(self, gate_up: Tensor, scheme: CodedScheme | None = None, *, alpha: float, limit: float) -> Any:
        """gate · sigmoid(alpha · gate) · (up + 1), of gate up to a limit and up within it (gpt-oss); as `silu_mul`."""

    def gelu(self, x: Tensor, scheme: CodedScheme | None = None) -> Any:
        """The same of [T, I] without a gate."""

    def head_input(self, hidden: Tensor, block_out: Tensor) -> Tensor:
        """A Medusa head's residual block: hidden [R, D] + silu(block_out [R, H, D])."""

    def argmax(self, logits: Tensor) -> Tensor:
        """[N, V] → [N] int64, of equals the first; -1 where the greatest is not a finite number."""

    def cutoff(self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        """The least logit that these leave to be drawn; equals are left together.

        Left are the `top_k` greatest; of these the most probable ones as long as those before have less than `top_p`
        of the probability (nucleus sampling: Holtzman et al. 2020, section 3.1); and of these what is at least `min_p`
        times as probable as the most probable one (Nguyen et al. 2024, section 3).

        Args:
            logits: [T, V] float32, over the temperature.
            top_k: [T] int64, from 1 on; V leaves all.
            top_p: [T] float32, above 0; 1 leaves all, though of a large vocabulary the mass may be rounded up to 1
                before the last token.
            min_p: [T] float32; 0 leaves all.

        Returns:
            [T] float32; -inf leaves all. Where the greatest is NaN or infinite it means nothing.
        """

    def draw(
        self,
        logits: Tensor,
        temperature: Tensor,
        seed: Tensor,
        first: Tensor,
        row: Tensor,
        depth: Tensor,
        max_depth: int,
    ) -> Tensor:
        """Draw a token at each of T nodes of R rows: of logits over the temperature with Gumbel noise the greatest,
        which is a draw from their softmax; at temperature 0 of the logits alone, as `argmax`.

        The noise (`noise.gumbel`) is that of the row's seed and the position, so nodes of one depth share it.

        Args:
            logits: [T, V] float32.
            temperature, seed: [R] float32 and int64.
            first: [R] int64, the position of what a root draws.
            row, depth: [T] int64, of each node.
            max_depth: of the nodes.

        Returns:
            [T] int64; -1 where the logits are not finite.
        """

    def best(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The best tokens of [N, V] logits, best first, and their probabilities: [N, count] int64 and float32."""

    def expand(
        self, state: RowState, index: Tensor, tree: TreeTensors, num_tokens: int, sizes: Tensor | None = None
    ) -> Trees:
        """The trees of decoding rows, `num_tokens` in all: every row's root, and of all rows' nodes the most probable.

        A node's probability is the product of the chances of the candidates on its path. So a row that is easy to
        predict brings more nodes than one that is not.

        Args:
            index: [R] int64, slots of the row state.
            tree: the nodes that a row may bring.
            num_tokens: at least R, at most R · n.
            sizes: [S] int64, numbers of tokens, at most R · n, whose `Trees.gains` are wanted.
        """

    def settle(
        self, state: RowState, cache: KVCache, trees: Trees, target: Tensor, accepted: Tensor | None = None
    ) -> Outcome:
        """Keep each row's longest accepted path: its K/V go to the end of the row's prefix, and the row moves on.

        The dummy row stays where it is, however often it stands among the rows.

        Args:
            target: [T] int64, the token that the target model continues each token with.
            accepted: [R, n] bool, for rows with a lossy rule (`speculation/verify.py`); None accepts a node that holds
                what the target drew at its parent.
        """

    def pack(self, state: RowState, trees: Trees, outcome: Outcome, size: int) -> Gained:
        """What rows keep of a step, for those who read more of it than its end.

        Args:
            trees, outcome: of the step, which was settled last.
            size: T, no fewer than the rows gained in all.
        """

    def begin_guesses(self, state: RowState, index: Tensor, num_candidates: int, most: int) -> Guesses:
        """Room for what a drafter that goes on from its own guesses will guess; nothing is guessed yet.

        Args:
            index: [R] int64, slots of the row state.
            num_candidates: C.
            most: I, nodes that a row may open.
        """

    def open_nodes(self, guesses: Guesses, level: Level, count: int) -> OpenNodes:
        """Open the nodes of a level that are worth most, `count` in all rows; of equals the first, in the first row.

        Args:
            level: below the one whose nodes' children were offered last.
            count: at most R · M.
        """

    def offer_children(
        self,
        guesses: Guesses,
        level: Level,
        nodes: OpenNodes | None,
        tokens: Tensor,
        chances: Tensor,
        token_map: Tensor | None,
    ) -> None:
        """Write down what may follow n nodes of a level.

        Args:
            nodes: whose new ones are meant; None for the roots of all rows.
            tokens, chances: [n, K] int64 and float32, by rank.
            token_map: [draft vocabulary] int64, what the tokens are in the base's; None where they are the same.
        """

    def propose(self, state: RowState, index: Tensor, candidates: Tensor, chances: Tensor) -> None:
        """Set the candidates of rows, [R, C] int64, and their chances, [R, C] float32; the dummy row's mean nothing.

        Their last dimension is contiguous.
        """
