"""Where a run may lie: on a disk, or in an object store."""

from pathlib import Path
from typing import Any

import pytest

from lorapar_ray.errors import UserError
from lorapar_ray.runs import RunDirectory
from lorapar_ray.storage.uris import Uri, place_of
from tests.tiny_run import lorapar_here

RUN = Uri("s3", "bucket", "runs/x")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("runs/x", Path("runs/x")),
        ("/a:/b", Path("/a:/b")),
        ("file:///shared/a%20b", Path("/shared/a b")),
        ("s3://bucket/runs/x/", RUN),
        ("S3://bucket/runs/x", RUN),
        ("gs://b/r", Uri("gs", "b", "r")),
        ("https://host/x", "no such storage here; give a path, or s3://, gs:// or file://"),
        ("s3://bucket", "write s3://BUCKET/FOLDER"),
        ("s3:///x", "write s3://BUCKET/FOLDER"),
        ("s3://bucket/a/../b", "write s3://BUCKET/FOLDER"),
        ("s3://KEY:SECRET@bucket/x", "credentials and options belong in the environment"),
        ("s3://bucket/x?endpoint_override=h", "credentials and options belong in the environment"),
        ("file://host/x", "write file:///FOLDER"),
    ],
)
def test_a_place_is_a_path_a_uri_or_refused(given: str, found: Any) -> None:
    if isinstance(found, str):
        with pytest.raises(UserError, match="--run-dir") as refused:
            place_of(given)
        assert found in str(refused.value) and "SECRET" not in str(refused.value)
    else:
        assert place_of(given) == found


def test_what_is_taken_out_of_a_run_goes_to_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["export", "-d", "run"], ["evaluate", "--model", "m"], ["ablate", "mask", "run.yaml"]):
        refused = lorapar_here(*command, "-o", "s3://bucket/out")
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
        assert "--out s3://bucket/out: " in refused.stderr and "give a path" in refused.stderr
    assert not [*tmp_path.iterdir()]


def test_a_run_on_a_disk_is_as_it_was(tmp_path: Path) -> None:
    run = RunDirectory(f"file://{tmp_path}/run")
    assert run.root == tmp_path / "run" and run.remote is None and run.place == str(run.root)
    assert run.address(run.adapter) == str(tmp_path / "run" / "adapter")
    with run.shared(run.sft) as handed:
        assert handed is None
