from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from manyheads.config import ConfigError
from manyheads.models.rope import NO_ROPE, POSITION_MARGIN, LongScaling, Rope, head_order
from manyheads.models.rope_keys import RopeKeys

CPU = torch.device("cpu")
DIM, LONGEST = 16, 4096
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn of its own length": {"rope_type": "yarn", "factor": 4.0},
    "yarn of no factor": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512},
    "yarn with all that there is": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 24,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
    "yarn of a given sharpness": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0],
        "long_factor": [8.0] * 8,
        "original_max_position_embeddings": 256,
    },
    "longrope by a factor": {
        "rope_type": "longrope",
        "factor": 3.0,
        "short_factor": [1.5] * 8,
        "long_factor": [8.0] * 8,
        "original_max_position_embeddings": 256,
    },
}


def keys(values: dict[str, Any], **own: Any) -> RopeKeys:
    path = Path("config.json")
    return RopeKeys(values=values, path=path, **{"head_dim": DIM, "max_position_embeddings": LONGEST} | own)


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_is_what_transformers_turns_by(kind: str) -> None:
    parameters = KINDS[kind] | {"rope_theta": 5000.0}
    config = LlamaConfig(
        hidden_size=2 * DIM,
        num_attention_heads=2,
        max_position_embeddings=LONGEST,
        rope_parameters=dict(parameters),
    )
    frequency, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, CPU)
    angle = torch.arange(256).float()[:, None] * frequency
    cos, sin = keys({"rope_parameters": parameters}).read().table(256, DIM, CPU, torch.float32)
    assert cos.shape == (256 + POSITION_MARGIN, 1, DIM)
    wanted = (angle.cos() * factor).repeat(1, 2)
    torch.testing.assert_close(cos[:256, 0], wanted, atol=2e-5, rtol=0)
    wanted = angle.sin() * factor
    torch.testing.assert_close(sin[:256, 0], torch.cat((-wanted, wanted), dim=1), atol=2e-5, rtol=0)


def test_rope_scaling_goes_before_rope_parameters() -> None:
    values = {"rope_parameters": {"rope_theta": 7.0}, "rope_scaling": {"type": "linear", "factor": 2.0}}
    rope = keys(values).read()
    assert rope == keys({"rope_scaling": values["rope_scaling"]}).read()
    assert rope.theta == 10000.0  # that of the parameters that are not looked at is lost
    assert keys(values | {"rope_theta": 9.0}).read().theta == 9.0
    assert keys({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 9.0}).read().theta == 7.0


def test_the_original_length_of_the_top_level_goes_first() -> None:
    values = {"rope_scaling": KINDS["longrope"], "original_max_position_embeddings": 64}
    scaling = keys(values).read().scaling
    assert isinstance(scaling, LongScaling)
    assert scaling.original_max_position_embeddings == 64


@pytest.mark.parametrize("dim", [4, 12, 16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_in_another_order_are_turned_alike(dim: int, interleaved: bool) -> None:
    """Products of queries and keys are those of the pairs as the checkpoint has them."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 40, DIM, dtype=torch.float64)
    rope = Rope(50.0, dim)
    cos, sin = rope.table(40 - POSITION_MARGIN, DIM, CPU, torch.float64)

    def ours(x: torch.Tensor) -> torch.Tensor:
        order = head_order(dim, DIM, interleaved)
        x = x if order is None else x[:, order]
        return x * cos[:, 0] + x.roll(DIM // 2, dims=-1) * sin[:, 0]

    def plain(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        angle = torch.arange(40).float()[:, None] * (1 / 50.0 ** (torch.arange(0, dim, 2).float() / dim))
        first = torch.arange(0, dim, 2) if interleaved else torch.arange(dim // 2)
        second = first + (1 if interleaved else dim // 2)
        turned = torch.view_as_complex(torch.stack((x[:, first], x[:, second]), -1))
        turned = turned * torch.polar(torch.ones_like(angle), angle).to(turned.dtype)
        x[:, first], x[:, second] = turned.real, turned.imag
        return x

    torch.testing.assert_close(ours(q) @ ours(k).T, plain(q) @ plain(k).T, atol=1e-5, rtol=1e-5)
    assert (head_order(dim, DIM, interleaved) is None) == (dim == DIM and not interleaved)


def test_no_rope_turns_nothing() -> None:
    cos, sin = NO_ROPE.table(10, DIM, CPU, torch.float32)
    assert cos.shape == sin.shape == (10 + POSITION_MARGIN, 1, DIM)
    assert bool((cos == 1).all())
    assert not sin.any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs a factor above 0, not None"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": -1}}, "'dynamic' needs a factor above 0, not -1"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' needs a low_freq_factor"),
        ({"rope_scaling": KINDS["llama3"] | {"high_freq_factor": 0.5}}, "low_freq_factor 1.0 is not below"),
        ({"rope_scaling": KINDS["longrope"] | {"long_factor": [1.0]}}, "8 numbers above 0 in long_factor"),
        ({"rope_scaling": KINDS["yarn"] | {"truncate": 1}}, "truncate 1"),
        ({"rope_scaling": KINDS["yarn"] | {"original_max_position_embeddings": "x"}}, "original_max.* not 'x'"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "'mrope' is not supported"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "not supported"),
        ({"rope_scaling": "linear"}, "must be an object, not 'linear'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 7.0}}}, "rope parameters of full_attention"),
        ({"rope_theta": "x"}, "rope_theta above 0, not 'x'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
    ],
)
def test_what_is_not_understood_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"config.json: .*{message}"):
        keys(values).read()


@pytest.mark.parametrize(("share", "dim"), [(0.5, 8), (0.75, 12), (1.0, 16), (None, 16)])
def test_a_family_may_turn_a_part_of_a_head(share: float | None, dim: int) -> None:
    values = {"partial_rotary_factor": share}
    assert keys(values, in_part=True).read().dim == dim


@pytest.mark.parametrize("share", [0.0, 1.5, 0.2, "x", 0.01])
def test_a_part_has_to_be_pairs_of_a_head(share: Any) -> None:
    with pytest.raises(ConfigError, match=r"config.json: .*(partial_rotary_factor must|no pairs)"):
        keys({"partial_rotary_factor": share}, in_part=True).read()
