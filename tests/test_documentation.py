"""Every Python block of README.md, CONTRIBUTING.md and docs/*.md runs, from top to bottom.

Files of the project that the pages link to exist.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?:\]\(|^\[[^]]*\]: )([^)\s]+)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_blocks_of_the_page_run(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in _BLOCK.finditer(text):
        # Empty lines in front make a traceback show the line of the page.
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block.group(1), str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_the_page_links_to_exist(page: Path) -> None:
    targets = _LINK.findall(page.read_text(encoding="utf-8"))
    files = [t.partition("#")[0] for t in targets if "://" not in t and not t.startswith("#")]
    assert [name for name in files if not (page.parent / name).exists()] == []
