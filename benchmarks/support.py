"""What holds for each family of models: tiny random checkpoints against transformers, and the page docs/support.md.

    python benchmarks/support.py                     # all families; writes results/support.json and the page
    python benchmarks/support.py --only Glm4ForCausalLM --out /tmp/support.json    # one, and no page
    python benchmarks/support.py --write-docs        # the page from the results

The configurations and the comparisons are those of the tests, with more and longer texts. Whatever differs ends the
run, and nothing is written then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common import ROOT, machine, markdown, write_between, write_json
from transformers.utils.logging import disable_progress_bar

from manyheads.config import ConfigError
from manyheads.gguf.architectures import ARCHITECTURES
from manyheads.models.registry import FAMILIES, read_config, shared
from tests.engine.test_families import TREES, compare, save
from tests.gguf import test_models as gguf
from tests.models import test_lora as lora
from tests.models import test_parallel as parallel
from tests.models.families import MODELS
from tests.quantization.test_quantized_engine import widened

RESULT = ROOT / "benchmarks" / "results" / "support.json"
PAGE = ROOT / "docs" / "support.md"
BEGIN, END = "<!-- tables: written by benchmarks/support.py --write-docs -->", "<!-- end of the tables -->"
EQUAL = "equal logits"
SCHEMES = ("int8", "int4", "fp8")
TEXTS, QUANTIZED_TEXTS = (8, 64), (3, 20)
"""Prompts for each configuration, and tokens that are added to each."""
CHANGES = {"phi3 stretched": {"max_position_embeddings": 256, "original_max_position_embeddings": 128}}
"""Of configurations whose texts could not be so long."""


@dataclass(frozen=True)
class Known:
    """What no run can tell of a family."""

    name: str
    drafters: str = ""
    """Public ones that are known to exist."""
    gpu: str = ""
    """Where this repository has results of it."""
    gguf: str = "not read"
    """Where no files of its own are read."""


H200, H100 = "../benchmarks/results/gpu_vllm/README.md", "../benchmarks/results/gpu_quantized_h100/README.md"
RANDOM = "../benchmarks/results/gpu_random.json"
KNOWN = {
    "LlamaForCausalLM": Known(
        "Llama 2 and 3, Vicuna, SmolLM2",
        "Medusa: FasterDecoding/medusa-vicuna-7b-v1.3. EAGLE-3: yuhuili/EAGLE3-LLaMA3.1-Instruct-8B, "
        "-LLaMA3.3-Instruct-70B, -DeepSeek-R1-Distill-LLaMA-8B, -Vicuna1.3-13B; RedHatAI's for Llama-3.1-8B",
        f"Vicuna-7B's shape measured on an [H200]({H200}) and an [H100]({H100})",
    ),
    "MistralForCausalLM": Known("Mistral", gguf="as Llama, without windows"),
    "Qwen2ForCausalLM": Known("Qwen2, Qwen2.5"),
    "Qwen3ForCausalLM": Known("Qwen3", "EAGLE-3: RedHatAI's for 8B, 14B and 32B; AngelSlim's for 1.7B to 32B"),
    "Phi3ForCausalLM": Known("Phi-3, Phi-4"),
    "Gemma2ForCausalLM": Known("Gemma 2"),
    "Gemma3ForCausalLM": Known("Gemma 3, text only"),
    "GraniteForCausalLM": Known("Granite 3"),
    "Olmo2ForCausalLM": Known("OLMo 2"),
    "SmolLM3ForCausalLM": Known("SmolLM3"),
    "Glm4ForCausalLM": Known("GLM-4 (0414)"),
    "Cohere2ForCausalLM": Known("Command R7B"),
    "Starcoder2ForCausalLM": Known("StarCoder2"),
    "MixtralForCausalLM": Known("Mixtral"),
    "Qwen3MoeForCausalLM": Known("Qwen3-MoE", gpu=f"30B-A3B's shape measured on an [H200]({RANDOM})"),
    "GptOssForCausalLM": Known("gpt-oss"),
    "SeedOssForCausalLM": Known("Seed-OSS"),
}


def known_of(architecture: str) -> Known:
    """What is known of a family; of one that is new, no more than its name."""
    return KNOWN.get(architecture, Known(architecture.removesuffix("ForCausalLM")))


class Mismatch(Exception):
    """A comparison failed; the message says which."""


@contextlib.contextmanager
def comparison(of: str, name: str) -> Iterator[Path]:
    """An empty folder for a comparison, whose failure is named."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        except Exception as error:
            raise Mismatch(f"{name}: {of} failed") from error


def texts(name: str, num_prompts: int, new_tokens: int) -> str:
    """Compares greedy texts, and says which layers have a window."""
    with comparison("greedy text against transformers", name) as folder:
        compare(folder, save(folder, name, **CHANGES.get(name, {})), num_prompts, new_tokens)
        windows = [window is not None for window in read_config(folder).windows]
    return "every layer" if all(windows) else "some layers" if any(windows) else "none"


def quantized(name: str, scheme: str, num_prompts: int, new_tokens: int) -> None:
    """Compares greedy texts of rounded weights; columns have to come in groups of 32."""
    inner = "moe_intermediate_size" if "moe_intermediate_size" in MODELS[name][1] else "intermediate_size"
    with comparison(f"greedy text in {scheme} against transformers with rounded weights", name) as folder:
        model = save(folder, name, **{inner: 64})
        compare(folder, widened(model, scheme), num_prompts, new_tokens, quantization=scheme)


def two_ranks(architecture: str, names: list[str]) -> str:
    """Compares logits of two ranks that share a model with those of one; or gives the error that refuses them."""
    if FAMILIES[architecture].can_be_shared:
        with comparison("meeting of ranks", architecture) as folder:
            ranks = parallel.join(folder)
            for name in names:
                with comparison("logits of two ranks", name) as model:
                    parallel.test_logits_are_those_of_one_rank(model, ranks, name, None)
        return EQUAL
    with comparison("the refusal of two ranks", architecture) as folder:
        save(folder, names[0])
        try:
            shared(read_config(folder), 2)
        except ConfigError as error:
            return str(error)
        raise ValueError("they are not refused")


def family(architecture: str, texts_of: tuple[int, int], quantized_texts: tuple[int, int]) -> dict[str, Any]:
    """All comparisons of a family: a record of the result. Raises Mismatch: one of them failed."""
    model_type = FAMILIES[architecture].model_type
    names = [name for name in MODELS if MODELS[name][0] == model_type]
    if not names:
        raise Mismatch(f"{architecture}: tests/models/families.py has no configuration of it")
    windows = {texts(name, *texts_of) for name in names}
    for name in names:
        for scheme in SCHEMES:
            quantized(name, scheme, *quantized_texts)
        with comparison("logits with adapters against merged weights", name) as folder:
            lora.test_an_adapters_sums_are_those_of_merged_weights(folder, name)
    files = [case for case, (name, *_) in gguf.CASES.items() if MODELS[name][0] == model_type]
    if bool(files) != any(file.family == architecture for file in ARCHITECTURES.values()):
        raise Mismatch(f"{architecture}: no GGUF file is compared, though such files are read")
    for case in files:
        with comparison("logits of a GGUF file", case) as folder:
            gguf.test_a_model_is_what_it_was_written_from(folder, case)
    return {
        "family": architecture,
        "configurations": names,
        "texts": len(names) * texts_of[0],
        "tokens": texts_of[1],
        "quantized_texts": {scheme: len(names) * quantized_texts[0] for scheme in SCHEMES},
        "quantized_tokens": quantized_texts[1],
        "trees": [size for size in TREES if size > 1],
        "windows": [kind for kind in ("every layer", "some layers", "none") if kind in windows],
        "two_ranks": two_ranks(architecture, names),
        "gguf_files": files,
        "lora": len(names),
    }


def tables(result: dict[str, Any]) -> list[str]:
    """The lines of the page that follow from a result."""
    about, families = result["machine"], result["families"]
    rows, people = [], []
    for found in families:
        known = known_of(found["family"])
        count, of = found["texts"], f"of {found['texts']} × {found['tokens']} tokens"
        bits = set(found["quantized_texts"].values())
        ranks = found["two_ranks"] if found["two_ranks"] == EQUAL else f"refused: `{found['two_ranks']}`"
        files = len(found["gguf_files"])
        rows.append(
            [
                known.name,
                f"{len(found['configurations'])}",
                f"{count} {of}",
                f"{count} {of}",
                ", ".join(f"{n} of {n} × {found['quantized_tokens']} tokens" for n in sorted(bits)),
                ranks,
                " or ".join(found["windows"]),
                f"{files} of {files}" if files else known.gguf,
                f"{found['lora']} of {found['lora']}",
            ]
        )
        gpu = known.gpu or "kernels in Triton's interpreter"
        people.append([known.name, f"`{found['family']}`", known.drafters or "none known", gpu])
    sizes = " and ".join(map(str, families[0]["trees"]))
    checked = (
        f"Checked against transformers {about['transformers']} with torch {about['torch']} on {about['date'][:10]}, "
        f"at commit {about['commit']}, on {about['cores']} cores of an {about['cpu']} "
        f"([raw result](../benchmarks/results/{RESULT.name}))."
    )
    header = [
        "Family", "configurations", "greedy text equal", f"the same with trees of {sizes}", "int8, int4 and fp8, each",
        "two ranks", "sliding windows", "GGUF", "LoRA",
    ]  # fmt: skip
    return [
        *(checked, "", *markdown(header, rows), "", "## Models, drafters, GPUs", ""),
        *markdown(["Family", "`architectures`", "public drafters", "GPU"], people),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=FAMILIES, nargs="+", help="needs --out: the page has all families")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--write-docs", action="store_true", help="write the page and run nothing")
    args = parser.parse_args()
    if args.only and args.out == RESULT:
        parser.error("--only needs --out")
    if not args.write_docs:
        torch.set_num_threads(1)
        logging.disable(logging.WARNING)  # tiny models have peculiar sizes
        disable_progress_bar()  # type: ignore[no-untyped-call]
        about = machine()
        with tempfile.TemporaryDirectory() as cache:
            os.environ["XDG_CACHE_HOME"] = cache  # in which folders of GGUF files are made
            families = []
            for architecture in args.only or FAMILIES:
                families.append(family(architecture, TEXTS, QUANTIZED_TEXTS))
                print(json.dumps(families[-1]), flush=True)
        write_json(args.out, {"machine": about, "families": families})
    if args.out == RESULT:
        write_between(PAGE, BEGIN, END, tables(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
