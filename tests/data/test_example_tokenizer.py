"""The shipped tokenizer is what its script makes of the shipped text."""

from tests.forked_python import run_python


def test_script_makes_the_shipped_tokenizer(book, tokenizer_path, tmp_path):
    example = book.parents[1]
    done = run_python(example / "make_tokenizer.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}: 4096 entries\n"
    shipped = (example / "tokenizer" / "tokenizer.json").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == shipped
