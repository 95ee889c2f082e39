"""Docs cannot drift: every setting is documented with its default."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ragkv.checkpoint import SUPPORTED
from ragkv.config import Settings
from ragkv.selection import STRATEGIES
from ragkv.terminal import settings_table

ROOT = Path(__file__).parent.parent


def test_every_setting_is_documented_as_it_is():
    table = settings_table(Settings)
    assert table in (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert "Undefined" not in table


@pytest.mark.parametrize("name", [*STRATEGIES, "full"])
def test_every_method_is_documented(name):
    assert f"| `{name}` |" in (ROOT / "docs" / "blending.md").read_text(encoding="utf-8")


def test_the_readme_names_every_supported_family():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").lower().replace("-", "")
    for family in SUPPORTED:
        assert family in readme


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
