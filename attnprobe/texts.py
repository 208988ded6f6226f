"""Texts to token ids and back: all calls of tokenizers, for batches and for display.

`TokenBatch` and `models` call these. What is left to others: masks and layout (batch).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from attnprobe.errors import BatchError
from attnprobe.validation import brief

# What a decoder writes for bytes that are no character, or not yet.
_REPLACEMENT = "\ufffd"
# UTF-8 has at most four bytes for a character.
_LONGEST_CHARACTER = 4
# As many tokens that wait for the end of a character are looked through for those that need not wait: with
# each token, all that wait are decoded again.
_MANY_WAITING = 4 * _LONGEST_CHARACTER

_MEDIUM = re.compile(r"[<\[].*?(image|img|video|audio).*[>\]]", re.IGNORECASE)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Return the text of each token, such that the joined texts are the text of the whole.

    A character whose bytes are spread over several tokens belongs to the first of them, and the others are
    empty. Bytes that are no character are replacement characters, and do not change their neighbours' texts.
    There is one exception to the joined text: of a run of an image's placeholder tokens, the first reads
    `<image>`, and the others are empty.

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
    waiting: list[int] = []
    # Decoded with the tokens before them: a lone SentencePiece token would lose its leading space.
    context: list[int] = []
    for i, token in enumerate(ids):
        waiting.append(token)
        whole = decode(context + waiting)
        is_open = whole.endswith(_REPLACEMENT) and i + 1 < len(ids)
        # The last character may not be complete yet. Earlier ones are, after as many tokens as it has bytes.
        if is_open and len(waiting) % _MANY_WAITING:
            continue
        settled = 0
        for stop, text in _parts(decode, context, waiting, whole):
            if is_open and stop > len(waiting) - _LONGEST_CHARACTER:
                break
            texts += [text, *[""] * (stop - settled - 1)]
            settled = stop
        if settled:
            context, waiting = waiting[:settled], waiting[settled:]
    return tuple(with_markers(ids, texts, _placeholders(tokenizer)))


def token_bytes(tokenizer: Any, ids: Sequence[int]) -> list[bytes | None]:
    """Return the bytes of each token, as far as the tokenizer's vocabulary tells them; else None.

    It does where tokens are made of bytes (byte-level BPE), and where bytes without a token have one of their
    own (`<0xE4>`). The texts of tokens that are only part of a character do not.

    Raises:
        BatchError: something that is not a tokenizer.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if isinstance(tokenizer, type) or not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise BatchError(f"tokenizer must be a transformers tokenizer; got {brief(tokenizer)}")
    found: list[bytes | None] = []
    for token in tokenizer.convert_ids_to_tokens(list(ids)):
        named = _NAMED_BYTE.fullmatch(token or "")
        if named:
            found.append(bytes([int(named[1], 16)]))
        elif token and all(character in _BYTES for character in token):
            found.append(bytes(_BYTES[character] for character in token))
        else:
            found.append(None)
    return found


def _byte_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for, as GPT-2 wrote them."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_characters()
_NAMED_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _parts(
    decode: Callable[[list[int]], str], context: list[int], tokens: list[int], whole: str
) -> list[tuple[int, str]]:
    """Divide tokens where no character is cut; return where each part ends, and its text.

    `whole` is the text of the tokens, decoded after their context.
    """
    before = decode(context)
    if not whole.startswith(before):
        # Some decoders turn all neighbouring bytes into replacement characters if one is wrong. The context
        # was right, and has its texts.
        context, before, whole = [], "", decode(tokens)
    parts = []
    for count in range(1, len(tokens) + 1):
        text = decode(context + tokens[:count]) if count < len(tokens) else whole
        # If a character were cut here, the tokens after it would change its replacement character.
        if whole.startswith(text) and text.startswith(before):
            parts.append((count, text[len(before) :]))
            before = text
    return parts


def with_markers(ids: Sequence[int], texts: Sequence[str], media: Mapping[int, str]) -> list[str]:
    """Return texts in which each run of a placeholder token is one marker, `<image>`.

    Placeholders are the ids in `media`, with what they stand for, and those whose text says so.

    >>> with_markers([7, 7, 7, 5], ["<|image_pad|>"] * 3 + ["a"], {})
    ['<image>', '', '', 'a']
    """
    shown: list[str] = []
    for token, run in itertools.groupby(ids):
        count = len(list(run))
        own = texts[len(shown) : len(shown) + count]
        named = _MEDIUM.fullmatch(own[0])
        medium = media.get(token) or (named and named[1].lower().replace("img", "image"))
        shown += [f"<{medium}>", *[""] * (count - 1)] if medium and count > 1 else own
    return shown


def _placeholders(tokenizer: Any) -> dict[int, str]:
    """Return the tokens that stand for parts of an image, video or sound, as far as a tokenizer says so."""
    found: dict[int, str] = {}
    for source in (tokenizer, getattr(tokenizer, "tokenizer", None)):
        for medium in ("image", "video", "audio"):
            token = getattr(source, f"{medium}_token_id", None)
            if isinstance(token, int):
                found.setdefault(token, medium)
    return found


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


def chat_prompts(
    tokenizer: Any, messages: Sequence[dict[str, str]] | Sequence[Sequence[dict[str, str]]]
) -> list[list[int]]:
    """Return the ids of one conversation or several, each up to where the assistant speaks.

    Raises:
        BatchError: a tokenizer without a chat template, or messages that the template rejects.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise BatchError("this tokenizer has no chat template: use TokenBatch.from_text")
    if not isinstance(messages, list | tuple) or not messages:
        raise BatchError(f"messages must be one conversation or a list of them; got {brief(messages)}")
    conversations: Sequence[Any] = [messages] if isinstance(messages[0], Mapping) else messages
    return [chat_prompt_ids(tokenizer, conversation) for conversation in conversations]


def chat_prompt_ids(tokenizer: Any, conversation: Sequence[dict[str, str]]) -> list[int]:
    """Return the ids of a conversation up to where the assistant speaks, using the chat template.

    Raises:
        BatchError: a conversation that the template rejects.
    """
    try:
        turns = list(conversation)
        # Templates and older versions of transformers write an empty turn for anything that has no role.
        if not all(isinstance(turn, Mapping) for turn in turns):
            raise TypeError("a turn must be a mapping")
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
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
