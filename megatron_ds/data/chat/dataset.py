"""Samples of conversations: one conversation each, or several that do not attend to one another."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from megatron_ds.columns import IGNORE_INDEX
from megatron_ds.data.chat.ends import learned_ends
from megatron_ds.data.chat.notes import counted
from megatron_ds.data.chat.options import ChatOptions
from megatron_ds.data.chat.packing import one_per_sample, pack
from megatron_ds.data.chat.tokens import Conversations
from megatron_ds.data.dataset import Sample, blank_sample, format_count
from megatron_ds.data.readers.bad_rows import total_bad_rows
from megatron_ds.data.readers.concat_index import ConcatIndex
from megatron_ds.errors import DataError


class ChatDataset:
    """Samples of S positions, padded on the right.

    Position t predicts token t + 1, if that token carries loss. In a packed sample `position_ids` begin at 0 with each
    conversation; the padding is a document of its own, without loss.

    Args:
        parts: the conversations of each source.
        seq_length: S.
        options: how conversations of more than S tokens are handled, and whether several share a sample.
        date: the date that the chat template writes as today's; None = it writes none.
        control: the tokenizer's special tokens, id -> text; None = unknown.

    Attributes:
        bad_rows: account of the rows that were left out.

    Raises:
        DataError: conversations are too long and `options.overlong` refuses them, or no conversation remains.
    """

    target_length = None
    ordered = False

    def __init__(
        self,
        parts: Sequence[Conversations],
        seq_length: int,
        options: ChatOptions,
        date: str | None = None,
        control: Mapping[int, str] | None = None,
    ) -> None:
        self.seq_length, self._control = seq_length, control or {}
        self.columns: tuple[str, ...] = ("input_ids", "targets")
        if options.packing:
            self.columns += ("position_ids",)
        self._parts, self._index = list(parts), ConcatIndex([len(part) for part in parts])
        lengths = np.concatenate([part.lengths for part in parts])
        self._overlong = np.flatnonzero(lengths > seq_length)
        self._options, self._date = options, date
        self.bad_rows = total_bad_rows(parts)
        self.bad_rows.log()
        if options.overlong == "refuse" and len(self._overlong):
            self._refuse_overlong(lengths)
        fitting = np.minimum(lengths, seq_length)
        self._learned = self._count_learned(fitting)
        dropped = self._overlong if options.overlong == "drop" else self._overlong[self._learned[self._overlong] == 0]
        self._kept = np.delete(np.arange(len(lengths)), dropped)
        if len(self._kept) == 0:
            raise DataError(
                f"data: {self._names}: none of {len(lengths):,} conversations is left of data.seq_length={seq_length}; "
                f"raise it to {lengths.max()}"
            )
        self._lengths = fitting[self._kept]
        self._packs = pack(self._lengths, seq_length) if options.packing else one_per_sample(len(self._kept))
        content = ["chat", *(part.key for part in parts), str(seq_length), options.overlong, str(options.packing)]
        self.fingerprint = hashlib.sha256("\n".join(content).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._packs)

    @cached_property
    def ends(self) -> dict[int, str]:
        """Control tokens that end the learned turns, with their texts."""
        return learned_ends(self._parts, self._control)

    @property
    def num_conversations(self) -> int:
        """Number of conversations in the samples."""
        return len(self._kept)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens of each conversation in the samples."""
        return self._lengths

    def conversation(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a conversation's ids (L,) int64, and which tokens carry loss (L,) bool, cut to S."""
        part, offset = self._index.locate(int(self._kept[index]))
        ids, learned = self._parts[part].read(offset)
        return ids[: self.seq_length], learned[: self.seq_length]

    def sample(self, index: int) -> Sample:
        """Return sample `index % len`: (S,) each, the same in every epoch."""
        sample = dict(blank_sample(self.columns, self.seq_length, None))
        end = 0
        for member in self._packs.members(index % len(self)).tolist():
            ids, learned = self.conversation(member)
            start, end = end, end + len(ids)
            sample["input_ids"][start:end] = ids
            sample["targets"][start : end - 1] = np.where(learned[1:], ids[1:], IGNORE_INDEX)
            if self._options.packing:
                sample["position_ids"][start:end] = np.arange(len(ids))
        if self._options.packing:
            sample["position_ids"][end:] = np.arange(self.seq_length - end)
        return sample

    def blank(self) -> Sample:
        """Return a sample without loss; see `blank_sample`."""
        return blank_sample(self.columns, self.seq_length, None)

    @property
    def notes(self) -> list[str]:
        """Columns and keys without effect, and the date that the template writes, if it does.

        Such as `tools: given in 12 conversations, not shown by the chat template`.
        """
        counts: Counter[str] = Counter()
        for part in self._parts:
            counts.update(dict(zip(part.notes.tolist(), part.note_counts.tolist())))
        notes = [counted(note, count) for note, count in counts.items()]
        return [*notes, f"the chat template writes the date {self._date} (data.date)"] if self._date else notes

    def describe(self) -> str:
        """Return a line such as `1,984 conversations (8 of more than 512 tokens dropped), 211 samples of 512: 97.4%
        filled, 63.0% of 105,126 tokens under loss`, followed by the notes."""
        tokens, learned = int(self._lengths.sum()), int(self._learned[self._kept].sum())
        notes = []
        dropped = len(self._index) - len(self._kept)
        if dropped:
            notes.append(f"{dropped:,} of more than {self.seq_length} tokens dropped")
        if self._options.overlong == "cut" and (cut := len(self._overlong) - dropped):
            notes.append(f"{cut:,} cut to {self.seq_length} tokens")
        if self.bad_rows.count:
            notes.append(self.bad_rows.note.removeprefix(", "))
        note = f" ({', '.join(notes)})" if notes else ""
        return (
            f"{len(self._kept):,} conversations{note}, {len(self):,} samples of {self.seq_length}: "
            f"{tokens / (len(self) * self.seq_length):.1%} filled, {learned / tokens:.1%} of {format_count(tokens)} "
            f"tokens under loss{''.join(f'; {note}' for note in self.notes)}"
        )

    @property
    def _names(self) -> str:
        return ", ".join(part.name for part in self._parts)

    def _count_learned(self, fitting: np.ndarray) -> np.ndarray:
        """Return (n,) int64: tokens of each conversation with loss when it is cut; nothing predicts the first."""
        counts = []
        start = 0
        for part in self._parts:
            sums = np.concatenate([[0], np.cumsum(part.learned, dtype=np.int64)])
            first, kept = part.starts[:-1], fitting[start : start + len(part)]
            counts.append(sums[first + kept] - sums[np.minimum(first + 1, first + kept)])
            start += len(part)
        return np.concatenate(counts)

    def _refuse_overlong(self, lengths: np.ndarray) -> None:
        part, offset = self._index.locate(int(self._overlong[0]))
        longest = int(lengths.max())
        raise DataError(
            f"data: {len(self._overlong):,} of {len(lengths):,} conversations have more tokens than data.seq_length="
            f"{self.seq_length}, the longest {longest:,}, the first at {self._parts[part].where(offset)}; set "
            f"data.overlong=drop or cut, or data.seq_length={longest}"
        )
