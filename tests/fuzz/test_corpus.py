"""Every input of the corpus, once through its target: what fuzzing has shown stays mended."""

import pytest

from tests.fuzz.target import MODULES, corpus_files, load


@pytest.mark.parametrize("name", MODULES)
def test_no_input_shows_a_bug(name: str) -> None:
    target, files = load(name), corpus_files(name)
    assert files
    for file in files:
        try:
            target.run_measured(file.read_bytes())
        except BaseException as error:
            error.add_note(f"input: {file}")
            raise
