"""Runs of a grid that stand as finished, without their work."""

from lorapar_ray.ablations.units import Unit
from lorapar_ray.pipeline import PIPELINE
from lorapar_ray.runs import FORMAT, write_json
from lorapar_ray.standing import inputs_of


def record_finished(unit: Unit) -> None:
    """As if every stage had run with the unit's settings; the files are the caller's."""
    if not unit.run.manifest():  # the files may be there already
        write_json(unit.run.manifest_path, {"format": FORMAT, "identity": {}, "stages": {}})
    for name in unit.stages:
        entries = unit.run.manifest()["stages"]
        inputs = inputs_of(PIPELINE[name], unit.config, entries, unit.run.fingerprints)
        unit.run.record(name, status="done", inputs=inputs, outputs=f"of {name}")
