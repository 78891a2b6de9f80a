"""Bad words become runs of tokens here, for the engine knows no text."""

from __future__ import annotations

import msgspec

from manyheads.frontend.tokenizer import Tokenizer
from manyheads.request import SamplingParams


def with_bad_tokens(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """Add the tokens of bad words to those that are not drawn: each word's alone, and with a space before it.

    Other ways to write a word in tokens are not looked for, as in vLLM.
    """
    if not params.bad_words:
        return params
    texts = (space + word for word in params.bad_words for space in ("", " "))
    runs = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    found = dict.fromkeys((*params.bad_token_ids, *filter(None, runs)))
    return msgspec.structs.replace(params, bad_token_ids=tuple(found))
