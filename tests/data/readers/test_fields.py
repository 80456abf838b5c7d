"""Fields that are named otherwise in the data: `data.columns`, and `column` of a source."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_ds.data.readers.source import Source
from megatron_ds.data.text.documents import TextSource
from megatron_ds.errors import DataError
from tests.data.readers.files import FORMS, json_lines
from tests.data.readers.rows import ID_ROWS, TEXTS, ids_of, prepared


@pytest.mark.parametrize("form", ["a.jsonl", "pretty.json", "a.csv", "a.parquet", "stream.arrow", "saved"])
def test_fields_that_are_named_otherwise(
    form: str, write: Any, open_: Any, tokenizer_path: str, tmp_path: Path
) -> None:
    """A field of our name is another field; the end of the field that is taken stands in the data's own name."""
    rows = [{"content": text, "text": "no", "ids": ids["input_ids"]} for text, ids in zip(TEXTS, ID_ROWS)]
    if form == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
        path = str(tmp_path / "saved")
    else:
        path = write(form, {**FORMS, "a.jsonl": json_lines}[form](rows))
    source = Source(path, columns=(("text", "content"),))
    assert list(TextSource(source).documents()) == TEXTS
    assert prepared(tokenizer_path, tmp_path, path, column="content") == TEXTS
    assert TextSource(source).digest() != TextSource(Source(path)).digest()
    renamed = open_("tokenized", Source(path, columns=(("input_ids", "ids"), ("labels", "ids"))))
    assert ids_of(renamed) == [row["input_ids"] for row in ID_ROWS]


@pytest.mark.parametrize("form", ["lines.jsonl", "a.parquet", "stream.arrow", "saved"])
def test_a_field_inside_of_another(form: str, write: Any, tokenizer_path: str, tmp_path: Path) -> None:
    rows = [{"meta": {"text": text}, "id": number} for number, text in enumerate(TEXTS)]
    if form == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    path = str(tmp_path / "saved") if form == "saved" else write(form, FORMS[form](rows))
    assert list(TextSource(Source(path, columns=(("text", "meta.text"),))).documents()) == TEXTS
    assert prepared(tokenizer_path, tmp_path, path, column="meta.text") == TEXTS


def test_a_field_that_is_not_there_is_named_as_in_the_data(write: Any, tmp_path: Path) -> None:
    source = Source(write("a.jsonl", json_lines([{"text": "x"}])), columns=(("text", "content"),))
    with pytest.raises(DataError, match=r"a\.jsonl:1: no field 'content', only text; name"):
        list(TextSource(source).documents())
