"""The special tokens around each document of a causal model's text: those that the tokenizer puts before a text, and
the end of text.
"""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from megatron_ds.data.readers.tokenizer import special_id

Begin = Literal["auto"] | bool
"""Whether documents begin with special tokens; "auto" = with those that the tokenizer itself puts before a text."""

_PROBE = "a"


@dataclass(frozen=True)
class DocumentFrame:
    """The special tokens around each document.

    Attributes:
        begin_ids: before it, such as that of `<s>`.
        end_id: after it; None = nothing.
        begin_text, end_text: these tokens as text.
    """

    begin_ids: tuple[int, ...] = ()
    end_id: int | None = None
    begin_text: str = ""
    end_text: str = ""

    @property
    def ends(self) -> dict[int, str]:
        """The id that data with this frame teach as an end, with its text."""
        return {} if self.end_id is None else {self.end_id: self.end_text}


def document_frame(
    tokenizer: PreTrainedTokenizerBase, path: str, begin: Begin, end_use: str | None, field: str = "data.bos=true"
) -> DocumentFrame:
    """Return the frame of documents.

    Args:
        tokenizer: the tokenizer.
        path: its directory, for errors.
        begin: whether documents begin with special tokens.
        end_use: the reason why the end of text is needed, for errors; None = documents have no end.
        field: setting that asks for a beginning, for errors.

    Raises:
        DataError: the tokenizer has no end of text, or a beginning is asked for and it has none.
    """
    begin_ids = leading_ids(tokenizer) if begin else ()
    if begin is True and not begin_ids:
        begin_ids = (special_id(tokenizer, path, "bos_token", f"{field} begins each document with it"),)
    end_id = special_id(tokenizer, path, "eos_token", end_use) if end_use is not None else None
    return DocumentFrame(
        begin_ids,
        end_id,
        "".join(_text(tokenizer, one) for one in begin_ids),
        _text(tokenizer, end_id) if end_id is not None else "",
    )


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that the tokenizer puts before a text, found by tokenizing one: its settings say it in many ways.

    Starts no threads, so that the process may fork afterwards.
    """
    plain, whole = (_encode(tokenizer, special) for special in (False, True))
    places = range(len(whole) - len(plain) + 1)
    start = next((place for place in places if whole[place : place + len(plain)] == plain), 0)
    return tuple(whole[:start])


def _encode(tokenizer: PreTrainedTokenizerBase, special: bool) -> list[int]:
    if not tokenizer.is_fast:
        return list(tokenizer(_PROBE, add_special_tokens=special, verbose=False)["input_ids"])
    found = tokenizer.backend_tokenizer.encode(_PROBE, add_special_tokens=special)
    return [one for one, is_text in zip(found.ids, found.attention_mask) if is_text]  # some are configured to pad


def _text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token_id))
