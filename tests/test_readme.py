"""The README: its code runs, its links exist, and its numbers are those of the result files."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_code_runs_in_order(capsys):
    namespace: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "Skew→CayleyMap" in printed
    assert "closed" in printed


def test_linked_files_exist():
    headings = re.findall(r"^#+ (.*)$", README, flags=re.M)
    anchors = {"#" + heading.lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert target in anchors or (ROOT / target).exists(), target


def test_tables_are_those_of_the_result_files():
    assert report.main(["--check"]) == 0
    assert "×" in report.tables()
