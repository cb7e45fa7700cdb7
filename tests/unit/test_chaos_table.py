"""The page of faults matches the tests' marks."""

from tests.chaos_table import FAULTS, ONLY, PAGE, STAGES, cells, page


def test_the_page_matches_the_marks() -> None:
    found = list(cells())
    assert {each.stage for each in found} <= set(STAGES) and {each.fault for each in found} <= set(FAULTS)
    assert {(each.stage, each.fault) for each in found} >= {("sft", "worker"), ("grpo", "node"), ("label", "driver")}
    assert set(ONLY) < set(FAULTS) and all(each.stage in ONLY.get(each.fault, STAGES) for each in found)
    text = PAGE.read_text()
    assert page(text, found) == text, "python -m tests.chaos_table"
