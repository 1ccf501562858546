"""The documentation runs, and its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_the_example_of_a_new_method_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "extend.md").read_text()
    example = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    example = example.replace("/tmp/movement", str(tmp_path / "run")).replace('"rounds": 20', '"rounds": 2')
    subprocess.run([sys.executable, "-c", example], cwd=ROOT, check=True, timeout=300)
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_within_the_project_exist(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", document.read_text())
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_left_to_be_filled_in(document: Path) -> None:
    assert "@@" not in document.read_text()
