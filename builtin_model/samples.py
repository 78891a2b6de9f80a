"""Print the model's answers to everyday questions: samples.py MODEL. Looks at them are part of training."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

PROMPTS = [
    "Tell me something about hip hop.",
    "Tell me something about Paris.",
    "What is photosynthesis?",
    "Who was Napoleon?",
    "Write a short story about a dragon.",
    "How do I make a good cup of tea?",
    "What is the capital of France?",
    "Explain gravity to a child.",
    "Hello!",
    "Who are you?",
    "Write a poem about the sea.",
    "Give me three tips for sleep.",
    "Tell me something about dogs.",
    "What is Python?",
    "Why is the sky blue?",
    "Describe the city of London.",
    "Compose an engaging travel blog post about a recent trip to Hawaii.",
    "What is machine learning?",
    "John has 3 apples and buys 4 more. How many apples does he have?",
    "Tell me a joke.",
    "Imagine you are a pirate. Describe your ship.",
    "What are the benefits of exercise?",
    "Tell me about the Second World War.",
    "Write an email to my boss asking for a day off.",
    "What should I cook tonight?",
    "Describe a sunset.",
    "Tell me something about Jupiter.",
    "What is love?",
    "Pretend to be a ghost. Introduce yourself.",
    "Name a famous painter.",
]


@torch.inference_mode()
def main(folder: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device).eval()
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(device)
        print(f"### {prompt}")
        for settings in ({"do_sample": False}, {"do_sample": True, "temperature": 0.5}):
            torch.manual_seed(0)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=160, eos_token_id=4, pad_token_id=0, **settings
            )
            answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            assert isinstance(answer, str)
            print("  -", answer.replace("\n", " / "))


if __name__ == "__main__":
    main(sys.argv[1])
