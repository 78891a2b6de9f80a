"""Texts and conversations for the built-in model, from the four data files (see README.md for sources and licences).

`documents` is everything as running text, for the first phase; `conversations` is what the model is to be good at.
spec_bench.jsonl is for measuring and is never read here.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Conversation = list[dict[str, str]]

ASK = [
    "Tell me something about {}.", "Tell me something about {}", "Tell me about {}.", "tell me about {}", "What is {}?",
    "What do you know about {}?", "Describe {}.", "Can you tell me about {}?", "Explain what {} is.", "{}?",
    "Give me some information about {}.", "I would like to know more about {}.", "Please describe {}.",
    "Write a short paragraph about {}.", "what is {}", "Could you explain {}?", "Write something about {}.",
]  # fmt: skip
ASK_PERSON = ["Who is {}?", "Who was {}?", "Tell me something about {}.", "Tell me about {}.", "who was {}",
              "What do you know about {}?", "What is {} known for?"]  # fmt: skip
ASK_SHORT = ["In one sentence, what is {}?", "Define {}.", "Describe {} in one sentence.", "What is {}, briefly?"]

SMALL_TALK: list[tuple[list[str], list[str]]] = [
    (["Hello", "Hello!", "Hi", "Hi!", "Hi there!", "Hey", "hello there", "Good morning", "Good evening!"],
     ["Hello! How can I help you today?", "Hi! What would you like to talk about?",
      "Hello! Ask me anything you like, and I will do my best to answer."]),
    (["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "who are you",
      "Are you a human?", "Are you a robot?"],
     ["I am the small built-in model of manyheads. I can write short answers, but I am tiny and often wrong about facts.",
      "I am a very small language model that ships with manyheads. I run on an ordinary laptop."]),
    (["What can you do?", "How can you help me?", "What are you good at?", "help"],
     ["I can answer simple questions, write short texts and describe well-known things. I am a small model, so please "
      "check what I say.", "I can write short paragraphs, tell stories and answer simple questions."]),
    (["Thank you", "Thanks!", "Thank you very much.", "thanks", "Thanks a lot for your help!"],
     ["You are welcome!", "You are welcome! Is there anything else I can do for you?", "My pleasure!"]),
    (["How are you?", "How are you doing?", "How are you today?", "how is it going"],
     ["I am doing well, thank you for asking. How can I help you?", "Very well, thank you! What is on your mind?"]),
    (["Goodbye", "Bye!", "See you later.", "Good night"], ["Goodbye! Have a nice day.", "Goodbye, and take care!"]),
    (["Tell me a joke.", "Do you know a joke?", "Make me laugh."],
     ["Why did the computer go to the doctor? Because it had a virus!",
      "Why do bees have sticky hair? Because they use honeycombs!",
      "What do you call a bear with no teeth? A gummy bear!"]),
    (["What is manyheads?", "Tell me about manyheads."],
     ["manyheads is a server for language models. It uses Medusa heads to guess several tokens at once and checks all "
      "guesses in one step, so that many people get their answers faster."]),
]  # fmt: skip


EVERYDAY: dict[str, str] = {
    "hip hop": "Hip hop is a style of popular music and a culture that began in the Bronx, New York City, in the 1970s. "
    "It is known for rapping over beats, for DJs who scratch and mix records, and for break dancing and graffiti. Early "
    "stars include Grandmaster Flash and Run-DMC. Today hip hop is one of the most popular kinds of music in the world.",
    "rap": "Rap is a way of making music in which words are spoken in rhythm and rhyme over a beat. It is the heart of "
    "hip hop and grew up in New York City in the 1970s. Rappers often tell stories about their own lives.",
    "jazz": "Jazz is a style of music that began in New Orleans in the early 20th century. It is known for swing, blue "
    "notes and improvisation. Famous jazz musicians include Louis Armstrong, Duke Ellington and Miles Davis.",
    "rock music": "Rock music is a kind of popular music that grew out of rock and roll in the 1950s. It is usually "
    "played with electric guitars, a bass guitar and drums. The Beatles and the Rolling Stones made it famous.",
    "music": "Music is the art of arranging sounds in time. People make music with their voices and with instruments "
    "such as the piano, the guitar and the drum. Every culture in the world has its own music.",
    "the moon": "The Moon is the only natural satellite of the Earth. It goes around the Earth about once a month and "
    "is the reason for the tides of the sea. Astronauts first walked on the Moon in 1969.",
    "the sun": "The Sun is the star at the center of the Solar System. It is a huge ball of hot gas that gives the "
    "Earth light and heat. Without the Sun, there would be no life on Earth.",
    "dogs": "Dogs are animals that have lived with people for thousands of years. They come from wolves and are known for "
    "their loyalty and their fine sense of smell. People keep dogs as pets, as guards and as helpers.",
    "cats": "Cats are small animals that many people keep as pets. They are good hunters, sleep a lot and like to keep "
    "themselves clean. A cat that is happy often purrs.",
    "coffee": "Coffee is a drink that is made from the roasted seeds of the coffee plant. It contains caffeine, which helps "
    "people to stay awake. Coffee was first grown in Ethiopia and Yemen and is now drunk all over the world.",
    "computers": "A computer is a machine that works with information. It follows a list of instructions that is called a "
    "program. Computers are used for writing, for calculating, for playing games and for talking to people far away.",
    "the internet": "The Internet is a network that connects computers all over the world. People use it to send "
    "messages, to read the news, to watch films and to buy things. It grew out of research in the 1960s and 1970s.",
    "Python": "Python is a programming language that is easy to read and to learn. It was made by Guido van Rossum and first "
    "released in 1991. Python is used for web sites, for science and for machine learning.",
    "football": "Football is a team game in which two teams of eleven players try to kick a ball into the goal of the other "
    "team. It is the most popular sport in the world. The World Cup is held every four years.",
    "love": "Love is a strong feeling of affection and care for another person. It can be felt for a partner, for family "
    "and for friends. Many songs, poems and stories are about love.",
    "pizza": "Pizza is a dish from Italy. It is a flat, round bread that is baked with tomato sauce, cheese and other "
    "toppings such as ham, mushrooms or olives. Pizza is eaten all over the world.",
    "Medusa": "In Greek mythology, Medusa was a woman with living snakes in place of hair. Those who looked at her turned to "
    "stone. She was beheaded by the hero Perseus.",
}  # fmt: skip


def read(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def clean(text: str) -> str:
    """Undo tokenizer spacing and the holes that stripped markup left."""
    text = text.replace("<|endoftext|>", "").replace("``", '"').replace("''", '"').replace("\u00a0", " ")
    text = re.sub(r"-LRB- ?", "(", re.sub(r" ?-RRB-", ")", text))
    text = re.sub(r"<br ?/?>", "\n", text)
    text = re.sub(r"&[a-z]+;|\\\\?", " ", text)
    text = re.sub(r" +([,.;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[]) +", r"\1", text)
    text = re.sub(r"\(\s*[,;]*\s*\)|\(\s*[,;:]+\s*", lambda m: "" if ")" in m[0] else "(", text)
    text = re.sub(r" (n't|'s|'re|'ve|'ll|'d|'m)\b", r"\1", text)
    text = re.sub(r"(\d{4}) (\d{1,2} [A-Z][a-z]+ \d{4}\))", r"\1 – \2", text)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", text) if s]


def whole(text: str) -> bool:
    """Ends like a finished text, and holds no stretch that repeats."""
    words = text.split()
    return text.endswith((".", "!", "?", '"', ")")) and len(set(words)) > 0.4 * len(words)


def openings(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Subject → encyclopedia opening, from the lists in the wiki_hop prompts."""
    found: dict[str, str] = {}
    for row in rows:
        if not row["task"].startswith("wiki_hop"):
            continue
        for item in re.split(r"\n\s*- |^- ", row["prompt"])[1:]:
            good = [s for s in sentences(clean(item.split("\n")[0])) if not re.search(r" of,| of \.|\(,|  |,,", s)]
            text = " ".join(good)
            match = re.match(r"(?:The |An? |In )?([A-Za-z0-9\"][^.]{1,60}?)(?: \(|, | is | are | was | were )", text)
            if match and len(text) > 60 and re.search(r" (is|are|was|were) ", text) and text.endswith("."):
                found.setdefault(match[1].strip('"').split(" or ")[0], text)
    return found


def about(subject: str, text: str, rng: random.Random) -> Conversation:
    """A question about a subject, and its opening cut to a few sentences."""
    parts = sentences(text)
    person = bool(re.search(r"\((born|\d{1,2} [A-Z]\w+ \d{4}|[A-Z]\w+ \d{1,2}, \d{4})", text[:140]))
    name = subject if rng.random() < 0.75 else subject.lower()
    if not person and rng.random() < 0.12:
        return turn(rng.choice(ASK_SHORT).format(name), parts[0])
    count = rng.choice((2, 3, 3, 4, 5))
    return turn(rng.choice(ASK_PERSON if person else ASK).format(name), " ".join(parts[:count])[:1200])


def turn(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def conversations(folder: Path, rng: random.Random) -> list[Conversation]:
    """What the model is to be good at: questions with short, whole, English answers."""
    rows = list(read(folder / "t0_50k.jsonl.gz"))
    result: list[Conversation] = []
    for subject, text in openings(rows).items():
        result += [about(subject, text, rng) for _ in range(8)]
    for subject, text in EVERYDAY.items():
        result += [about(subject, text, rng) for _ in range(60)]
    for row in read(folder / "gpteacher.jsonl.gz"):
        question = clean(row["instruction"]) + ("\n" + row["input"].strip() if row["input"].strip() else "")
        answer = row["response"].strip()
        if 1 < len(answer) < 2400:
            result += [turn(question, answer)] * (3 if row["source"] == "roleplay" else 2)
    for row in read(folder / "gsm8k_train.jsonl.gz"):
        answer = re.sub(r"<<[^>]*>>", "", row["answer"]).replace("\n#### ", "\nThe answer is ") + "."
        result.append(turn(row["question"], answer))
    for row in rows:
        prompt, completion = clean(row["prompt"]), clean(row["completion"])
        if len(prompt) > 3000:
            continue
        if 80 < len(completion) < 1600 and whole(completion) and not row["task"].startswith("wiki_bio"):
            result.append(turn(prompt, completion))
        elif len(completion) > 3 and rng.random() < 0.06:
            result.append(turn(prompt, completion))
    for questions, answers in SMALL_TALK:
        result += [turn(q, a) for q in questions for a in answers] * 12
    rng.shuffle(result)
    joined = [a + b for a, b in zip(result[::12], result[1::12], strict=False) if len(str(a + b)) < 2000]
    return result + joined


def documents(folder: Path) -> list[str]:
    """Everything as running text: each prompt with its completion once, and the longer passages by themselves."""
    seen: set[str] = set()
    result: list[str] = []
    for row in read(folder / "t0_50k.jsonl.gz"):
        prompt, completion = clean(row["prompt"]), clean(row["completion"])
        body = prompt[:400]
        if body in seen:
            continue  # the same passage under another question
        seen.add(body)
        result.append(f"{prompt}\n{completion}")
    for row in read(folder / "gpteacher.jsonl.gz"):
        result.append(f"{row['instruction']}\n{row['input']}\n{row['response']}".replace("\n\n", "\n"))
    for row in read(folder / "gsm8k_train.jsonl.gz"):
        result.append(row["question"] + "\n" + re.sub(r"<<[^>]*>>", "", row["answer"]))
    return result
