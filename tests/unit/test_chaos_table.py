"""The page of faults matches the tests' marks, and every cell has a test."""

from tests.chaos_table import FAULTS, ONLY, PAGE, STAGES, cells, having, page


def test_the_page_matches_the_marks() -> None:
    found = list(cells())
    assert {each.stage for each in found} <= set(STAGES) and {each.fault for each in found} <= set(FAULTS)
    assert {(each.stage, each.fault) for each in found} >= {("sft", "worker"), ("grpo", "node"), ("label", "driver")}
    assert set(ONLY) < set(FAULTS) and all(each.stage in having(each.fault) for each in found)
    text = PAGE.read_text()
    assert page(text, found) == text, "python -m tests.chaos_table"


def test_every_stage_is_put_under_every_fault_that_it_can_have() -> None:
    tried = {(each.stage, each.fault) for each in cells()}
    assert [(stage, fault) for fault in FAULTS for stage in having(fault) if (stage, fault) not in tried] == []
