"""The page of faults says what the tests' marks say."""

from tests.chaos_table import FAULTS, ONLY, PAGE, STAGES, cells, page


def test_the_page_is_of_these_marks() -> None:
    found = list(cells())
    assert {each.stage for each in found} <= set(STAGES) and {each.fault for each in found} <= set(FAULTS)
    assert {(each.stage, each.fault) for each in found} >= {("sft", "worker"), ("grpo", "node"), ("label", "driver")}
    assert set(ONLY) < set(FAULTS) and all(each.stage in ONLY.get(each.fault, STAGES) for each in found)
    text = PAGE.read_text()
    assert page(text, found) == text, "python -m tests.chaos_table"
