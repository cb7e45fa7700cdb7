"""The versions that are recorded, and those that a run's manifest keeps."""

from importlib.metadata import version

from lorapar_ray.versions import installed_versions, versions_of_a_result


def test_the_manifest_keeps_versions_that_affect_results_and_nodes_report_those_that_all_need() -> None:
    kept, asked = versions_of_a_result(), installed_versions()
    assert kept["lm-eval"] == version("lm-eval") and "lm-eval" not in asked
    assert kept.items() >= {(name, found) for name, found in asked.items() if found is not None}
    assert None not in kept.values()
