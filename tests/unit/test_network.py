"""The network interface by which processes of several machines connect."""

import os

import pytest
import ray

from lorapar_ray.network import GLOO_INTERFACE, NCCL_INTERFACE, interface_of, meet_on_rays_interface


def test_an_interface_is_found_by_its_address() -> None:
    found = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.2", "fe80::1%eth0"]}
    assert interface_of("10.0.0.2", found) == "eth0" and interface_of("fe80::1", found) == "eth0"
    assert interface_of("127.0.0.1", found) == "lo"
    assert interface_of("203.0.113.7", found) is None  # the address of a machine behind a router, seen from outside


@pytest.mark.parametrize(("variable", "interface"), [(GLOO_INTERFACE, "lo"), (NCCL_INTERFACE, "=lo")])
def test_workers_meet_where_ray_does_unless_the_user_says_otherwise(
    variable: str, interface: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    for each in (GLOO_INTERFACE, NCCL_INTERFACE):
        monkeypatch.setenv(each, "eth7")
    meet_on_rays_interface()
    assert os.environ[variable] == "eth7"
    monkeypatch.delenv(variable)
    meet_on_rays_interface()
    assert os.environ[variable] == interface
