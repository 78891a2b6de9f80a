"""Does vLLM's own code take the EAGLE-3 drafters that are written here, and draft the same tokens with them?

    manyheads train builtin --kind eagle3 --data PROMPTS --out DRAFTER --draft-vocab 2000 --passes 3 --rate 2e-3 \\
      --max-prompt-tokens 200 --max-new-tokens 64 --rows 2 --epochs 100 --max-steps 200 --device cpu  # 500 of GPTeacher
    python benchmarks/vllm_eagle3.py VLLM DRAFTER        # VLLM: vllm_parts.py says what is in that folder

1. The drafter is read as `manyheads train` wrote it, and in the three formats of `manyheads convert`; so are drafters
   made of it that differ in what a format can say: vocabulary, embedding, norms, rotary embedding, layers. vLLM's
   `get_config` reads config.json, its registry names the class, whose `load_weights` reads the weights. All parameters
   are NaN before, and all keys are compared with what the parameters hold then.
2. vLLM's `EagleProposer` drafts chains of three tokens behind every token of greedy replies from the second on, each
   time from the whole text up to there, as it does behind a prompt. The hidden states are those that vLLM's own Llama
   gives for the layers that vLLM finds in config.json. The chains are compared with those of our engine while it writes
   the same replies. How many are the same with layers that are one less says what a wrong reading would show as.

No GPU is needed. Of vLLM run, as they are: what reads configurations, llama.py, llama_eagle3.py, qwen3_eagle3.py and
all their layers (in `forward_native`), the weight loaders, and spec_decode/eagle.py with the kernel that advances
positions and slots, in Triton's interpreter. What stands for the rest is in vllm_parts.py and here: above all a plain
attention over vLLM's slots and block tables.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import argparse
import ast
import contextlib
import importlib
import itertools
import json
import math
import shutil
import tempfile
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import vllm_parts
from common import BUILTIN, ROOT, SPEC_BENCH, machine, save, table
from gpu import spec_bench_prompts
from safetensors.torch import load_file
from torch import Tensor, nn

from manyheads import LLM, EngineConfig, SamplingParams
from manyheads.batch import RowState
from manyheads.checkpoint import read_json
from manyheads.cli import main as manyheads
from manyheads.engine.build import build_engine
from manyheads.engine.runner import Runner
from manyheads.models.registry import read_config
from manyheads.models.rope import LinearScaling, Llama3Scaling, YarnScaling
from manyheads.request import EngineRequest
from manyheads.speculation.drafter import Kept
from manyheads.speculation.eagle3.checkpoint import Eagle3Weights, read_drafter
from manyheads.speculation.eagle3.export import DRAFTS, FORMATS, write_drafter
from manyheads.speculation.medusa.checkpoint import STATISTICS
from manyheads.speculation.tree import Tree

DEPTH, BLOCK, LONGEST = 3, 16, 2048
NEVER = 0
"""The padding token, which the base never says."""
TOKENS_IN, TOKENS_OUT = 64, 48
CHAIN = Tree(tuple((0,) * depth for depth in range(DEPTH + 1)))


def below(package: str, names: str) -> list[str]:
    return [f"{package}.{name}" for name in names.split()]


FILES = [
    *("envs", "ir", "sequence", "version"),
    *below("config", "utils"),
    *below("ir", "op ops ops.layernorm tolerances util"),
    *below("model_executor", "custom_op parameter utils"),
    *below("model_executor.layers", "activation layernorm linear logits_processor vocab_parallel_embedding"),
    *below("model_executor.layers", "quantization.base_config rotary_embedding"),
    *below("model_executor.layers.rotary_embedding", "base common linear_scaling_rope llama3_rope yarn_scaling_rope"),
    *below("model_executor.models", "interfaces interfaces_base llama llama_eagle3 qwen2 qwen3 qwen3_eagle3 utils"),
    *below("transformers_utils", "config config_parser_base configs configs.eagle repo_utils utils"),
    *below("transformers_utils.configs", "speculators speculators.algos speculators.base"),
    *below("utils", "collection_utils func_utils math_utils"),
    *below("v1.spec_decode", "eagle llm_base_proposer utils"),
    *below("v1.worker", "gpu_model_runner"),
]


class Settings(types.SimpleNamespace):
    """Stands for vLLM's VllmConfig."""

    get_quantization_config = staticmethod(lambda *_: None)


CONTEXT = types.SimpleNamespace()
"""What stands for vLLM's forward context, and its current VllmConfig."""


@contextlib.contextmanager
def forward_context(attn_metadata: Any, _: Any, *, slot_mapping: Any = None, **__: Any) -> Iterator[None]:
    """Stands for vLLM's set_forward_context."""
    CONTEXT.metadata, CONTEXT.slots = attn_metadata, slot_mapping
    yield


class Metadata(types.SimpleNamespace):
    """Stands for vLLM's CommonAttentionMetadata, and for what a backend makes of it."""

    def batch_size(self) -> int:
        return len(self.seq_lens)

    @classmethod
    def build_for_drafting(cls, common_attn_metadata: Metadata, draft_index: int) -> Metadata:
        return common_attn_metadata

    @classmethod
    def of(cls, lengths: list[int], more: int = 0) -> Metadata:
        """Requests whose texts of these lengths are computed as a whole, with blocks for so many more tokens."""
        blocks = -(-(max(lengths) + more) // BLOCK)
        table = torch.arange(len(lengths) * blocks).view(len(lengths), blocks).flip(0)  # in no simple order
        start = torch.tensor([0, *lengths]).cumsum(0)
        slots = [table[r, torch.arange(n) // BLOCK] * BLOCK + torch.arange(n) % BLOCK for r, n in enumerate(lengths)]
        return cls(
            query_start_loc=start.int(),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_table_tensor=table.int(),
            slot_mapping=torch.cat(slots),
            max_seq_len=max(lengths),
            _seq_lens_cpu=None,
            _num_computed_tokens_cpu=None,
            seq_lens_cpu_upper_bound=None,
        )


class Attention(nn.Module):
    """Stands for vLLM's: K/V go to their slots, and each query looks at its request's up to its own."""

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, prefix: str, **_: Any) -> None:
        super().__init__()
        self.head_size, self.scale, self.prefix = head_size, scale, prefix
        self.cache = torch.zeros(0, 2, num_kv_heads, head_size)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        metadata, slots = CONTEXT.metadata[self.prefix], CONTEXT.slots[self.prefix]
        q, k, v = (x.view(len(q), -1, self.head_size) for x in (q, k, v))
        needed = metadata.block_table_tensor.numel() * BLOCK
        if len(self.cache) < needed:
            self.cache = torch.full((needed, *self.cache.shape[1:]), torch.nan)
        self.cache[slots] = torch.stack((k, v), dim=1)
        out = []
        for row, (start, stop) in enumerate(itertools.pairwise(metadata.query_start_loc.tolist())):
            known, new = int(metadata.seq_lens[row]), stop - start
            at = torch.arange(known)
            keys, values = self.cache[metadata.block_table_tensor[row, at // BLOCK] * BLOCK + at % BLOCK].unbind(1)
            mask = at <= torch.arange(known - new, known)[:, None]
            query, keys, values = (x.transpose(0, 1)[None] for x in (q[start:stop], keys, values))
            y = F.scaled_dot_product_attention(query, keys, values, mask, scale=self.scale, enable_gqa=True)
            out.append(y[0].transpose(0, 1).flatten(1))
        return torch.cat(out)


MEMBERS: dict[str, dict[str, Any]] = {
    "compilation.decorators": {"support_torch_compile": vllm_parts.undecorated},
    "config": {"VllmConfig": Settings, "get_current_vllm_config": lambda: CONTEXT.settings},
    "distributed.parallel_state": vllm_parts.MEMBERS["distributed"],
    "distributed.utils": {"get_pp_indices": lambda layers, *_: (0, layers)},
    "forward_context": {"set_forward_context": forward_context},
    "model_executor.layers.attention": {"Attention": Attention},
    "model_executor.layers.attention.encoder_only_attention": {"Attention": Attention},
    "model_executor.models.adapters": dict.fromkeys(("as_embedding_model", "as_seq_cls_model"), lambda model: model),
    "model_executor.offloader": {"get_offloader": lambda: types.SimpleNamespace(wrap_modules=list)},
    "multimodal": {
        "MULTIMODAL_REGISTRY": types.SimpleNamespace(supports_multimodal_inputs=lambda _: False),
    },
    "tracing": {"instrument": vllm_parts.undecorated},
    "triton_utils": {"tl": triton.language, "triton": triton},
    "v1.attention.backend": {"AttentionType": types.SimpleNamespace(DECODER="decoder", ENCODER_ONLY="encoder_only")},
    "v1.cudagraph_dispatcher": {
        "CudagraphDispatcher": lambda _: types.SimpleNamespace(
            dispatch=lambda tokens, **_: (None, types.SimpleNamespace(num_tokens=tokens))
        )
    },
    "v1.utils": {"CpuGpuBuffer": lambda *_, **__: None},
}


def of_vllm(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"vllm.{module}"), name)


def variants(drafter: Eagle3Weights) -> Iterator[tuple[str, Eagle3Weights, tuple[str, ...]]]:
    """Drafters that differ in what a format can say, and the formats that can say it."""
    generator = torch.Generator().manual_seed(0)

    def norms(names: str, size: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + torch.randn(size, generator=generator) / 4 for name in names.split()}

    def changed(more: dict[str, Tensor] | None = None, **changes: Any) -> Eagle3Weights:
        dtype = drafter.tensors["fc.weight"].dtype
        tensors = {name: tensor.to(dtype) for name, tensor in (more or {}).items()}
        return replace(drafter, config=replace(drafter.config, **changes), tensors=drafter.tensors | tensors)

    hidden, vocabulary = drafter.config.hidden_size, drafter.config.vocab_size
    assert drafter.token_map is not None
    rows = torch.zeros(vocabulary, hidden, dtype=drafter.tensors["lm_head.weight"].dtype)
    rows[drafter.token_map] = drafter.tensors["lm_head.weight"]
    whole = changed({"lm_head.weight": rows}, draft_vocab_size=vocabulary)
    del whole.tensors["d2t"]
    embedding = {"embed_tokens.weight": torch.randn(vocabulary, hidden, generator=generator) / 8}
    # every other number of a state, and of what reads or writes one
    narrow = {name: tensor.clone() for name, tensor in drafter.tensors.items() if name != "d2t"}
    narrow["embed_tokens.weight"] = embedding["embed_tokens.weight"][:, ::2]
    for key, tensor in narrow.items():
        if key.endswith(("fc.weight", "norm.weight", "o_proj.weight", "down_proj.weight")):
            narrow[key] = tensor[::2]
        elif key != "embed_tokens.weight":
            narrow[key] = tensor[:, ::2]
    narrow = {key: tensor.contiguous() for key, tensor in narrow.items()}
    fc_norms = norms("fc_norm.0 fc_norm.1 fc_norm.2", hidden)
    head_norms = norms("midlayer.self_attn.q_norm midlayer.self_attn.k_norm", drafter.config.head_dim)
    yield "whole vocabulary", whole, FORMATS
    yield "own embedding", changed(embedding), FORMATS
    yield "linear scaling", changed(rope_scaling=LinearScaling(4.0)), FORMATS
    llama3 = changed(rope_theta=5e5, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64), layer_ids=(1, 3, 8))
    yield "llama3 scaling, layers 1, 3, 8", llama3, FORMATS[1:]
    yarn = YarnScaling(4.0, 64, 0.1 * math.log(4.0) + 1)
    yield "yarn scaling", changed(rope_scaling=yarn), FORMATS[1:]
    yield "yarn scaling, attention factor 1", changed(rope_scaling=replace(yarn, attention_factor=1.0)), FORMATS[1:]
    yield "narrower than the base", changed(narrow, hidden_size=hidden // 2), FORMATS[1:]
    yield "fc_norm, norm_output", changed(fc_norms, fc_norm=True, norm_output=True), FORMATS[1:]
    yield "norm_before_residual", changed(norm_before_residual=True), FORMATS[2:]
    yield "norm_before_fc", changed(norms("input_norm", 3 * hidden), norm_before_fc=True), FORMATS[2:]
    yield "qk_norm", changed(head_norms, qk_norm=True), FORMATS[2:]


class Vllm:
    """vLLM's side: the built-in base in its Llama, and drafters with it."""

    def __init__(self, folder: Path) -> None:
        vllm_parts.install(folder, FILES, MEMBERS)
        registry = ast.parse((folder / "vllm/model_executor/models/registry.py").read_text())
        self.registry = next(
            ast.literal_eval(node.value)
            for node in registry.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_SPECULATIVE_DECODING_MODELS"
        )
        config = of_vllm("transformers_utils.config", "get_config")(BUILTIN, False, config_format="hf")
        model = types.SimpleNamespace(
            hf_config=config,
            dtype=torch.float32,
            head_dtype=torch.float32,
            max_model_len=LONGEST,
            uses_mrope=False,
            uses_xdrope_dim=0,
            use_fp64_gumbel=False,
            get_num_layers=lambda _: config.num_hidden_layers,
        )
        self.settings = Settings(
            model_config=model,
            cache_config=None,
            compilation_config=None,
            load_config=None,
            parallel_config=types.SimpleNamespace(data_parallel_rank=0, data_parallel_size=1),
            quant_config=None,
            scheduler_config=types.SimpleNamespace(max_num_seqs=TOKENS_OUT, max_num_batched_tokens=2**14),
        )
        CONTEXT.settings = self.settings
        self.base = of_vllm("model_executor.models.llama", "LlamaForCausalLM")(vllm_config=self.settings)
        unset(self.base)
        self.base.load_weights(load_file(BUILTIN / "model.safetensors").items())
        assert all(param.isfinite().all() for param in self.base.parameters())

    def config(self, folder: Path) -> Any:
        """A drafter's configuration, as SpeculativeConfig makes it."""
        config = of_vllm("transformers_utils.config", "get_config")(folder, False, config_format="hf")
        eagle = of_vllm("transformers_utils.configs.eagle", "EAGLEConfig")
        speculators = of_vllm("transformers_utils.configs.speculators", "SpeculatorsConfig")
        if isinstance(config, speculators):
            found = speculators.extract_vllm_speculative_config(read_json(folder / "config.json"))
            assert found == {"method": "eagle3", "num_speculative_tokens": DRAFTS}
        return (
            config if isinstance(config, (eagle, speculators)) else eagle(config, method="eagle3", model_type="eagle")
        )

    def load(self, folder: Path) -> tuple[Any, dict[str, Any]]:
        """A proposer with the drafter of a folder in float32, and what vLLM made of the files."""
        config = self.config(folder)
        draft = types.SimpleNamespace(
            hf_config=config,
            uses_mrope=False,
            uses_xdrope_dim=0,
            get_hidden_size=lambda: config.hidden_size,
            get_inputs_embeds_size=lambda: config.hidden_size,
        )
        self.settings.speculative_config = types.SimpleNamespace(
            draft_model_config=draft,
            method="eagle3",
            num_speculative_tokens=DEPTH,
            parallel_drafting=False,
            use_local_argmax_reduction=False,
            use_heterogeneous_vocab=False,
            rejection_sample_method="standard",
            draft_sample_method="greedy",
        )
        module, name = self.registry[config.architectures[0]]
        model = of_vllm(f"model_executor.models.{module}", name)(vllm_config=self.settings)
        unset(model)
        state = load_file(folder / "model.safetensors")
        model.load_weights(state.items())
        held = places(model)
        state.pop("t2d", None)  # says what d2t says
        proposer = of_vllm("v1.spec_decode.eagle", "EagleProposer")(self.settings, torch.device("cpu"))
        proposer.model, proposer.block_size = model, BLOCK
        layers = [layer.prefix for layer in model.modules() if isinstance(layer, Attention)]
        proposer._draft_attn_layer_names = set(layers)
        builder = types.SimpleNamespace(layer_names=layers, get_metadata_builder=lambda: Metadata)
        proposer.draft_attn_groups = [builder]
        own_embedding = model.has_own_embed_tokens
        proposer._maybe_share_embeddings(self.base)
        proposer._maybe_share_lm_head(self.base)
        return proposer, {
            "architecture": config.architectures[0],
            "class": name,
            "layers": self.layers(config),
            "keys": len(state),
            "keys_without_parameter": sorted(state.keys() - held.keys()),
            "keys_equal_in_parameters": sum(torch.equal(held[key], state[key].to(held[key])) for key in state),
            "own_embedding": own_embedding,
            "parameters_unset": sum(int(not p.isfinite().all()) for p in model.parameters()),
        }

    def layers(self, config: Any) -> list[int]:
        """The base's layers that vLLM reads for a drafter (GPUModelRunner.load_model)."""
        runner = of_vllm("v1.worker.gpu_model_runner", "GPUModelRunner")
        draft = types.SimpleNamespace(hf_config=config)
        spoken = types.SimpleNamespace(speculative_config=types.SimpleNamespace(draft_model_config=draft))
        named = runner._get_eagle3_aux_layers_from_config(spoken)
        return list(named or self.base.get_eagle3_default_aux_hidden_state_layers())

    def states(self, tokens: list[int], layers: list[int]) -> tuple[Tensor, Tensor]:
        """What the base says comes next at each place, and [T, 3 · hidden] for a drafter."""
        self.base.set_aux_hidden_state_layers(tuple(layers))
        metadata = Metadata.of([len(tokens)])
        names = [layer.prefix for layer in self.base.modules() if isinstance(layer, Attention)]
        context = dict.fromkeys(names, metadata), dict.fromkeys(names, metadata.slot_mapping)
        with forward_context(context[0], None, slot_mapping=context[1]):
            hidden, states = self.base(torch.tensor(tokens), torch.arange(len(tokens)))
        return self.base.compute_logits(hidden).argmax(-1), torch.cat(states, dim=-1)

    def chains(self, proposer: Any, prompt: int, tokens: list[int], states: Tensor) -> Tensor:
        """[places, DEPTH], drafts behind each token of a reply from its second on; `prompt` tokens are before it."""
        lengths = list(range(prompt + 1, len(tokens)))
        known, following = torch.tensor(tokens), torch.tensor(tokens)[lengths]
        drafts: Tensor = proposer.propose(
            DEPTH,
            target_token_ids=torch.cat([known[:n] for n in lengths]),
            target_positions=torch.cat([torch.arange(n) for n in lengths]),
            target_hidden_states=torch.cat([states[:n] for n in lengths]),
            next_token_ids=following.int(),
            token_indices_to_sample=None,
            common_attn_metadata=Metadata.of(lengths, DEPTH),
            sampling_metadata=types.SimpleNamespace(all_greedy=True),
        )
        return drafts


def unset(model: nn.Module) -> None:
    for param in model.parameters():
        if param.is_floating_point():
            param.data.fill_(torch.nan)


def places(model: Any) -> dict[str, Tensor]:
    """What vLLM's parameters hold, by the keys of the files."""
    layer = model.model.layers[0]
    q, kv = layer.self_attn.q_size, layer.self_attn.kv_size
    found = dict(model.model.named_parameters())
    for at, names, sizes in (("self_attn.qkv", "q k v", [q, kv, kv]), ("mlp.gate_up", "gate up", None)):
        joined = found.pop(f"layers.0.{at}_proj.weight")
        parts = joined.chunk(2) if sizes is None else joined.split(sizes)
        module = at.split(".")[0]
        found |= {f"layers.0.{module}.{n}_proj.weight": part for n, part in zip(names.split(), parts, strict=True)}
    found["embed_tokens.weight"] = found["embed_tokens.weight"][: model.config.vocab_size]
    found["lm_head.weight"] = model.lm_head.weight[: model.config.draft_vocab_size]
    found["d2t"] = model.draft_id_to_target_id
    return found | {name.replace("layers.0.", "midlayer."): tensor for name, tensor in found.items()}


def our_chains(folder: Path, replies: list[tuple[int, list[int]]]) -> list[Tensor]:
    """[places, DEPTH] of each reply: what our engine's drafter guesses while it writes them.

    The engine is given other tokens than were guessed, which are never right, so that each step gains one token. Behind
    a prompt it guesses one token only, so that chains begin behind a reply's second token.
    """
    statistics = {"accuracy": [[0.9, 0.8]] * DEPTH}  # two children for each node, and all are looked at
    (folder / STATISTICS).write_text(json.dumps(statistics))
    config = EngineConfig(
        model=str(BUILTIN),
        heads=str(folder),
        dtype="float32",
        tree_size=2 ** (DEPTH + 1) - 1,
        num_threads=1,
        max_num_seqs=len(replies),
    )
    engine = build_engine(config)
    runner = engine.runner
    assert isinstance(runner, Runner)
    drafter: Any = runner.drafter
    propose, chain = drafter.propose, [column - 1 for column in drafter.columns(CHAIN)[1:]]
    guessed: dict[int, list[int]] = {}

    def observed(state: RowState, kept: Kept, depth: int, nodes: float) -> tuple[Tensor, Tensor]:
        tokens, chances = propose(state, kept, depth, nodes)
        if depth == DEPTH:
            assert bool((chances[:, chain] > 0).all())
            guessed.update(zip(kept.index.tolist(), tokens[:, chain].tolist(), strict=True))
        return torch.full_like(tokens, NEVER), chances

    drafter.propose = observed
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS_OUT + 4 * DEPTH, ignore_eos=True)
    for i, (prompt, tokens) in enumerate(replies):
        engine.add_request(EngineRequest(request_id=str(i), prompt_token_ids=tokens[:prompt], params=params))
    found = [torch.full((len(tokens) - prompt - 1, DEPTH), -1) for prompt, tokens in replies]
    while engine.has_work():
        engine.step()
        for request in engine.scheduler.running:
            prompt, tokens = replies[int(request.request_id)]
            place = len(request.tokens) - prompt - 2
            if 0 <= place < len(tokens) - prompt - 1:
                assert request.tokens == tokens[: len(request.tokens)], "the engine writes another reply"
                found[int(request.request_id)][place] = torch.tensor(guessed.pop(request.row))
    assert all(bool((chains >= 0).all()) for chains in found)
    return found


@torch.no_grad()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("vllm", type=Path, help="the folder of the unpacked wheel")
    parser.add_argument("drafter", type=Path, help="of the built-in base, with a vocabulary of its own")
    parser.add_argument("--spec-bench", type=Path, default=SPEC_BENCH)
    parser.add_argument(
        "--requests", type=int, default=16, help="replies for the drafter as it is; others get a quarter"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "vllm_heads.json")
    args = parser.parse_args()
    vllm, model = Vllm(args.vllm), read_config(BUILTIN)
    result: dict[str, Any] = {"machine": machine(), "vllm": vllm_parts.version(args.vllm), "rows": []}
    prompts = spec_bench_prompts(BUILTIN, args.spec_bench, TOKENS_IN, args.requests)
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS_OUT, ignore_eos=True)
    outputs = LLM(str(BUILTIN), speculative=False, dtype="float32", max_num_seqs=16).generate(prompts, params)
    replies = [(len(p), [*p, *o.outputs[0].token_ids]) for p, o in zip(prompts, outputs, strict=True)]

    def compare(title: str, form: str, folder: Path, count: int) -> None:
        proposer, read = vllm.load(folder)
        same = drafts = base_says = control = 0
        said = set[int]()
        for (prompt, tokens), ours in zip(replies[:count], our_chains(folder, replies[:count]), strict=True):
            following, states = vllm.states(tokens[:-1], read["layers"])
            base_says += int((following[prompt - 1 :] == torch.tensor(tokens[prompt:])).sum())
            theirs = vllm.chains(proposer, prompt, tokens, states)
            same += int((theirs == ours).sum())
            drafts += ours.numel()
            if title == "trained":
                _, wrong = vllm.states(tokens[:-1], [layer - 1 for layer in read["layers"]])
                control += int((vllm.chains(proposer, prompt, tokens, wrong) == ours).sum())
            said |= set(ours.flatten().tolist())
        row = {"drafter": title, "format": form, **read, "replies_tokens": count * TOKENS_OUT}
        row |= {"base_says_the_same": base_says, "drafted_tokens": drafts, "equal": same, "different_tokens": len(said)}
        if title == "trained":
            row["equal_with_layers_one_less"] = control
        result["rows"].append(row)
        print(json.dumps(row), flush=True)

    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        shutil.copytree(args.drafter, out / "written", ignore=shutil.ignore_patterns("training"))
        compare("trained", "as written", out / "written", args.requests)
        for form in FORMATS:
            manyheads(["convert", str(args.drafter), str(out / form), "--to", form, "--base", str(BUILTIN)])
            compare("trained", form, out / form, args.requests)
        for title, weights, forms in variants(read_drafter(args.drafter, model)):
            for form in forms:
                write_drafter(weights, out / title / form, form, base=str(BUILTIN), model=model)
                compare(title, form, out / title / form, args.requests // 4)
    shown = ("drafter", "format", "keys", "keys_equal_in_parameters", "parameters_unset", "drafted_tokens", "equal")
    table(shown, [[row[name] for name in shown] for row in result["rows"]])
    save(args.out, "eagle3", result)


if __name__ == "__main__":
    main()
