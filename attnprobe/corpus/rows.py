"""What a row of a corpus must hold, and its tokens: prompt and response as text, chat or ids.

`read_rows` turns the raw rows of a window into token ids, or says why a row cannot be scored. Which form a
row has follows from its fields: `response_ids` are ids; `messages` a chat, whose last turn is the response
unless there is a field for it; otherwise `prompt` and `response` are texts or, as trainers write them, lists
of turns. What is left to others: files (sources), tokenizing (texts) and scoring (scorer).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from attnprobe.adapters.base import Adapter
from attnprobe.corpus.sources import RawRow, Source
from attnprobe.errors import BatchError, ParameterError
from attnprobe.texts import chat_prompt_ids
from attnprobe.validation import brief


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The names of the fields of a row.

    Attributes:
        prompt, response: texts, or lists of turns.
        messages: a chat: a list of turns, `{"role": ..., "content": ...}`.
        prompt_ids, response_ids: token ids.
        id: what identifies a row, a text or a number, kept as text; a row may lack it.
        keep: further fields, such as whether the answer is right, that are kept with the scores, as JSON; NaN
            and infinities become null, for which JSON has no word.

    Raises:
        ParameterError: names that are not texts.
    """

    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"
    prompt_ids: str = "prompt_ids"
    response_ids: str = "response_ids"
    id: str = "id"
    keep: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the names; `keep` is stored as a tuple."""
        keep = self.keep
        keep = (keep,) if isinstance(keep, str) else tuple(keep) if isinstance(keep, Iterable) else (None,)
        object.__setattr__(self, "keep", keep)
        names = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "keep"}
        for field, name in [*names.items(), *(("keep", name) for name in keep)]:
            if not isinstance(name, str) or not name:
                raise ParameterError(f"the column {field} must be named by a text; got {brief(name)}")

    def describe(self) -> dict[str, Any]:
        """Return the names as JSON can hold them."""
        return {**asdict(self), "keep": list(self.keep)}


@dataclass(frozen=True)
class Row:
    """A row that can be scored, or that was rejected.

    Attributes:
        number: its number in the input; None if an engine handed it over without one.
        id: what identifies it, as text; None if it has none.
        kept: the fields to keep, as a JSON object; None if there are none.
        prompt, response: token ids; empty if it was rejected.
        rejected: why it cannot be scored; None if it can.
    """

    number: int | None
    id: str | None = None
    kept: str | None = None
    prompt: tuple[int, ...] = ()
    response: tuple[int, ...] = ()
    rejected: str | None = None

    @property
    def length(self) -> int:
        """The number of its tokens."""
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class RowReader:
    """How rows become tokens.

    Attributes:
        columns: the names of their fields.
        tokenizer: for texts and chats; None if all rows hold ids.
        adapter: of the model that is to read them.
        chat: whether a prompt that is a text is put into the chat template, as a user's turn.
        longest: the largest number of tokens of a row; None: as many as the model takes.
    """

    columns: Columns
    tokenizer: Any
    adapter: Adapter
    chat: bool = False
    longest: int | None = None

    @staticmethod
    def of(
        model: Any, adapter: Adapter, tokenizer: Any, columns: Columns, *, chat: bool, longest: int | None
    ) -> RowReader:
        """Return the reader of a model's rows.

        By default the longest row is as long as the model was made for, although one with rotary positions
        would run longer ones too.
        """
        config = getattr(model, "config", None)
        if longest is None and config is not None and hasattr(config, "get_text_config"):
            longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        return RowReader(columns, tokenizer, adapter, chat, longest)

    def read(self, raw: Sequence[RawRow]) -> list[Row]:
        """Return the rows in their order; those that cannot be scored have the reason, and no tokens."""
        found: list[tuple[RawRow, _Parts | str]] = []
        for row in raw:
            try:
                found.append((row, self._parts(row)))
            except _Bad as bad:
                found.append((row, str(bad)))
        parts = [part for _, part in found if not isinstance(part, str)]
        # Only the prompt gets the tokenizer's special tokens, as in TokenBatch.from_text.
        prompts = iter(self._encoded([part[0] for part in parts], special=True))
        responses = iter(self._encoded([part[1] for part in parts], special=False))
        rows = []
        for row, part in found:
            if isinstance(part, str):
                rows.append(self._row(row, (), (), part))
                continue
            ids = next(prompts), next(responses)
            problem = self._problem(*ids)
            rows.append(self._row(row, *ids, None) if problem is None else self._row(row, (), (), problem))
        return rows

    def _row(self, raw: RawRow, prompt: Any, response: Any, rejected: str | None) -> Row:
        values = raw.values if isinstance(raw.values, dict) else {}
        try:
            name = _identity(values.get(self.columns.id), self.columns.id)
        except _Bad as bad:
            name, prompt, response, rejected = None, (), (), rejected or str(bad)
        kept = {key: values[key] for key in self.columns.keep if key in values}
        return Row(
            raw.number,
            None if name is None else _writable(name),
            json.dumps(_finite(kept), default=str) if kept else None,
            tuple(prompt),
            tuple(response),
            None if rejected is None else _writable(rejected),
        )

    def _parts(self, row: RawRow) -> _Parts:
        """Return prompt and response, each as ids or, where it is yet to be tokenized, as a text."""
        if row.problem is not None:
            raise _Bad(row.problem)
        values, names = row.values, self.columns
        if values.get(names.response_ids) is not None:
            ids = [_ids(values, name) for name in (names.prompt_ids, names.response_ids)]
            return ids[0], ids[1]
        if values.get(names.messages) is not None:
            turns = _turns(values[names.messages], names.messages)
            if values.get(names.response) is None:
                if not turns or turns[-1].get("role") != "assistant":
                    raise _Bad(f"missing field: {names.messages} does not end with the assistant's turn, and "
                               f"there is no {names.response}")  # fmt: skip
                return self._chat(turns[:-1]), _text(turns[-1].get("content"), "the content of a turn")
            return self._chat(turns), _response(values, names.response)
        prompt = _field(values, names.prompt)
        response = _response(values, names.response)
        if isinstance(prompt, list):
            return self._chat(_turns(prompt, names.prompt)), response
        text = _text(prompt, names.prompt)
        return self._chat([{"role": "user", "content": text}]) if self.chat else text, response

    def _chat(self, turns: list[dict[str, Any]]) -> list[int]:
        for turn in turns:
            _text(turn.get("role"), "the role of a turn")
            _text(turn.get("content"), "the content of a turn")
        self._check_tokenizer()
        try:
            return chat_prompt_ids(self.tokenizer, turns)
        except BatchError as error:
            raise _Bad(f"wrong type: {error}") from error

    def _encoded(self, parts: Sequence[list[int] | str], *, special: bool) -> list[list[int]]:
        """Return ids for texts, all at once: a fast tokenizer then uses all cores."""
        texts = [part for part in parts if isinstance(part, str)]
        found: Any = iter(())
        if texts:
            self._check_tokenizer()
            found = iter(self.tokenizer(texts, add_special_tokens=special)["input_ids"])
        return [next(found) if isinstance(part, str) else part for part in parts]

    def _check_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise ParameterError(
                "rows of text need a tokenizer: score(..., tokenizer=...), or a model that is saved with one"
            )

    def _problem(self, prompt: list[int], response: list[int]) -> str | None:
        """Return why tokens cannot be scored; None if they can."""
        if not response:
            return "empty: the response has no token"
        length = len(prompt) + len(response)
        limits = [limit for limit in (self.longest, self.adapter.context_length) if limit is not None]
        if limits and length > min(limits):
            return f"too long: {length} tokens, of at most {min(limits)}"
        largest = max(*prompt, *response, 0)
        if largest >= self.adapter.vocabulary_size:
            return f"wrong type: token id {largest} is not below {self.adapter.vocabulary_size}"
        if media := self.adapter.media_tokens.keys() & {*prompt, *response}:
            return f"wrong type: token {min(media)} stands for a part of an image or sound"
        return None


def check_fields(source: Source, columns: Columns) -> None:
    """Check that every field that was named occurs in some row: a misspelt one would be null everywhere.

    Fields with their usual names are not asked for, since a row has one form of several. Windows are read
    until all are found: mostly one.

    Raises:
        ParameterError: a field that no row has.
    """
    usual = Columns()
    given = {field: name for field, name in columns.describe().items() if field != "keep"}
    wanted = {*columns.keep, *(name for field, name in given.items() if name != getattr(usual, field))}
    seen: set[str] = set()
    for window in range(source.window_count):
        if wanted <= seen:
            return
        seen.update(*(row.values for row in source.window(window) if isinstance(row.values, dict)))
    check_named(wanted, seen, "no row of the input")


def check_named(wanted: Iterable[str], there: Iterable[str], where: str) -> None:
    """Check that fields are among those that there are; `where` begins the message.

    Raises:
        ParameterError: a field that is not.

    >>> check_named(["corect"], ["id", "correct"], "no row of the input")
    Traceback (most recent call last):
    attnprobe.errors.ParameterError: no row of the input has the field 'corect'; there are correct, id
    """
    known = set(there)
    if missing := sorted(set(wanted) - known):
        names = ", ".join(sorted(known)) or "none"
        raise ParameterError(f"{where} has the field {', '.join(map(repr, missing))}; there are {names}")


_Parts = tuple[list[int] | str, list[int] | str]


class _Bad(Exception):
    """Why a row cannot be scored."""


def _field(values: dict[str, Any], name: str) -> Any:
    if name in values and values[name] is None:
        raise _Bad(f"missing field: {name} is null")
    if name not in values:
        there = ", ".join(sorted(map(str, values))) or "no fields"
        raise _Bad(f"missing field: {name}; the row has {there}")
    return values[name]


def _identity(value: Any, name: str) -> str | None:
    """Return what identifies a row, as text; None if it has nothing."""
    if value is None or value != value:
        # Tables turn numbers of which some are missing into floats, and these into NaN.
        return None
    if isinstance(value, bool | bytes | list | dict):
        raise _Bad(f"wrong type: {name} must be a text or a number; got {brief(value)}")
    return str(value)


def _finite(value: Any) -> Any:
    """Return a value as JSON can hold it: NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _Bad(f"wrong type: {name} must be a text; got {brief(value)}")
    if _writable(value) != value:
        # JSON may escape half a character, which no tokenizer takes.
        raise _Bad(f"not UTF-8: {name} holds half of a surrogate pair")
    return value


def _response(values: dict[str, Any], name: str) -> str:
    """Return a response as text; as a list of turns, it must be a single one."""
    value = _field(values, name)
    if isinstance(value, list):
        turns = _turns(value, name)
        if len(turns) != 1:
            raise _Bad(f"wrong type: {name} must be one turn; got {len(turns)}")
        value = turns[0].get("content")
    text = _text(value, name)
    if not text:
        raise _Bad(f"empty: {name} has no text")
    return text


def _turns(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise _Bad(f"wrong type: {name} must be a list of turns; got {brief(value)}")
    return [dict(turn) for turn in value]


def _ids(values: dict[str, Any], name: str) -> list[int]:
    value = _field(values, name)
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise _Bad(f"wrong type: {name} must be a list of token ids; got {brief(value)}")
    return value


def _writable(text: str) -> str:
    """Return a text with what UTF-8 cannot hold replaced."""
    return text.encode(errors="replace").decode()
