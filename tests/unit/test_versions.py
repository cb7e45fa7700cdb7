"""Which versions are looked up, and which of them a run's manifest keeps."""

from importlib.metadata import version

from lorapar_ray.versions import installed_versions, versions_of_a_result


def test_the_manifest_keeps_what_decides_a_result_and_nodes_are_asked_for_what_all_need() -> None:
    kept, asked = versions_of_a_result(), installed_versions()
    assert kept["lm-eval"] == version("lm-eval") and "lm-eval" not in asked
    assert kept.items() >= {(name, found) for name, found in asked.items() if found is not None}
    assert None not in kept.values()
