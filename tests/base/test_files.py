"""Files. Run: pytest tests/base/test_files.py"""

from __future__ import annotations

from pathlib import Path

from wikift.base.files import read_jsonl


def test_json_lines(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "none") == []
    lines = ['{"text": "one\u2028line\x85 only"}', "[1]", '{"step": 2}', '{"st']
    (tmp_path / "file").write_text("\n".join(lines), encoding="utf-8")
    assert read_jsonl(tmp_path / "file") == [{"text": "one\u2028line\x85 only"}, {"step": 2}], "the last one is torn"
