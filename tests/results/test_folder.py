"""The folder: what is in it that cannot be read is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_page import make_comparison

import wdanalysis as wd
from wdanalysis.errors import OutputError
from wdanalysis.results import folder


@pytest.mark.parametrize("text", ["[]", "{", '{"options": 3}', '{"skipped": [1]}'])
def test_provenance_that_nobody_here_wrote_is_one_sentence(tmp_path: Path, text: str) -> None:
    make_comparison().save(tmp_path, figures=[], report=False)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(OutputError, match="cannot be read"):
        wd.Comparison.load(tmp_path)


def test_tables_are_whole_before_others_write(tmp_path: Path) -> None:
    comparison = make_comparison()

    def others() -> list[Path]:
        loaded = folder.load(tmp_path)
        assert len(loaded.metrics) == len(comparison.metrics)
        assert "page.html" not in loaded.run.outputs
        (tmp_path / "page.html").write_text("")
        return [tmp_path / "page.html"]

    written = folder.save(tmp_path, comparison._findings, comparison.run, others=others)
    assert written[-2:] == [tmp_path / "page.html", tmp_path / "run.json"]
    assert "page.html" in folder.load(tmp_path).run.outputs
    folder.save(tmp_path, comparison._findings, comparison.run)
    assert not (tmp_path / "page.html").exists()
