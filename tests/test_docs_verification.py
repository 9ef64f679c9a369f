"""docs/verification.md against the code."""

from __future__ import annotations

import re
from pathlib import Path

from fxp_layernorm.export.diagnosis import STAGES

TEXT = (Path(__file__).parent.parent / "docs" / "verification.md").read_text(encoding="utf-8")


def test_stages_are_those_of_the_code() -> None:
    assert dict(re.findall(r"^\| (\w) \| (.+) \|$", TEXT, re.M)) == STAGES
