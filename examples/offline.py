"""Answer a few questions without a server: `LLM` is the whole engine in this process."""

from __future__ import annotations

import argparse

from manyheads import LLM, SamplingParams

QUESTIONS = ("Tell me something about hip hop.", "Who was Napoleon?", "Write a short story about a dragon.")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin", help="a hub id, a local folder, or builtin (default)")
    parser.add_argument("--max-tokens", type=int, default=100)
    args = parser.parse_args()

    llm = LLM(args.model)
    # One call for all of them: they are computed together, and each answer is the one that the question gets alone.
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=args.max_tokens))
    for question, output in zip(QUESTIONS, outputs, strict=True):
        answer = output.outputs[0]
        print(f"{question}\n  {answer.text}\n  [{len(answer.token_ids)} tokens in {answer.num_steps} steps]\n")
