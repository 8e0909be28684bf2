"""The budgets of the audits: a spill that is known passes, a larger one fails."""

from __future__ import annotations

import json

import pytest

from tests.helpers import audit_triton

FILES = sorted(audit_triton.BUDGETS.glob("*_triton.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_known_spills_name_cases_and_other_versions(file):
    """What the budget's own Triton spills is mended, not known."""
    budget = json.loads(file.read_text())
    spills = budget.get("spills", {})
    assert budget["triton"] not in spills
    for known in spills.values():
        assert set(known) <= set(budget["cases"])
        assert min(known.values()) > 0


def test_a_spill_past_the_known_one_fails(monkeypatch, tmp_path):
    triton = pytest.importorskip("triton")
    spills = {triton.__version__: {"one": 8}, "0.0.0": {"two": 8}}
    cases = {"one": {"registers": 255}, "two": {"registers": 255}}
    file = tmp_path / "op_triton.json"
    file.write_text(json.dumps({"triton": "0.0.1", "spills": spills, "cases": cases}))
    monkeypatch.setattr(audit_triton, "BUDGETS", tmp_path)
    for name, spilled, passes in (
        ("one", 0, True), ("one", 8, True), ("one", 16, False), ("two", 0, True), ("two", 8, False),
    ):  # fmt: skip
        kernel = {"spilled": spilled, "shared": 0, "registers": 255}
        if passes:
            audit_triton.check("op", name, kernel)
        else:
            with pytest.raises(AssertionError, match=f"{spilled} bytes a thread spilled"):
                audit_triton.check("op", name, kernel)
