"""Texts to token ids and back: all calls of tokenizers, for batches and for display.

`TokenBatch` and `models` call these. What is left to others: masks and layout (batch).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attnprobe.errors import BatchError
from attnprobe.validation import brief


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Return the text of each token, such that the joined texts are the text of the whole.

    A character whose bytes are spread over several tokens belongs to the first of them, and the others are
    empty.

    Raises:
        BatchError: something that is not a tokenizer, or ids that it does not know.
    """
    if isinstance(tokenizer, type) or not hasattr(tokenizer, "decode"):
        raise BatchError(f"tokenizer must be a transformers tokenizer; got {brief(tokenizer)}")

    def decode(some: list[int]) -> str:
        try:
            return str(tokenizer.decode(some, clean_up_tokenization_spaces=False)) if some else ""
        except (OverflowError, IndexError) as error:
            raise BatchError(f"the tokenizer has no token {max(some)}: {error}") from error

    texts: list[str] = []
    pending: list[int] = []
    # Decoded with the tokens before them: a lone SentencePiece token would lose its leading space.
    context: list[int] = []
    for i, token in enumerate(ids):
        pending.append(token)
        whole = decode(context + pending)
        if whole.endswith("\ufffd") and i + 1 < len(ids):
            # The last character is not complete yet.
            continue
        texts += [whole[len(decode(context)) :], *[""] * (len(pending) - 1)]
        context, pending = pending, []
    return tuple(texts)


def as_texts(texts: Any, name: str) -> list[str]:
    """Return one text or several as a list.

    Raises:
        BatchError: anything else.
    """
    if isinstance(texts, str):
        return [texts]
    # A column of a table, or a generator, is as good as a list.
    if isinstance(texts, Iterable) and not isinstance(texts, bytes | Mapping):
        texts = list(texts)
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise BatchError(f"{name} must be a text or a list of texts; got {brief(texts)}")
    return list(texts)


def chat_prompt_ids(tokenizer: Any, conversation: Sequence[dict[str, str]]) -> list[int]:
    """Return the ids of a conversation up to where the assistant speaks, using the chat template.

    Raises:
        BatchError: a conversation that the template rejects.
    """
    try:
        text = tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # A template may raise its own errors, jinja's and Python's.
        raise BatchError(
            f"the chat template rejects {brief(conversation)} ({type(error).__name__}: {error}): a "
            'conversation is a list of {"role": ..., "content": ...}'
        ) from error
    return encoded(tokenizer, text, special=False)


def encoded(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Return the ids of a text, with or without the tokenizer's special tokens."""
    if not callable(tokenizer) or isinstance(tokenizer, type) or not hasattr(tokenizer, "decode"):
        raise BatchError(f"tokenizer must be a transformers tokenizer; got {brief(tokenizer)}")
    encoded = tokenizer(text) if special else tokenizer(text, add_special_tokens=False)
    try:
        return list(encoded["input_ids"])
    except (KeyError, TypeError, IndexError) as error:
        raise BatchError(f"tokenizer must be a transformers tokenizer; got {brief(tokenizer)}") from error
