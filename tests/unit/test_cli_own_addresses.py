"""What a server says of where it can be dialled."""

import pytest

from shoal.base.errors import ConfigError
from shoal.cli import own_addresses as module
from shoal.cli.own_addresses import HOSTS_MAX, dialled_hosts, own_addresses, own_host
from shoal.cli.ring_footing import listen_near
from shoal.net.address import Address
from tests.unit.gossip_cases import ANN

HERE = ["127.0.0.1", "::1", "172.17.0.1", "10.0.0.5", "fd00::2", "fe80::1", "10.0.0.5"]


@pytest.mark.parametrize(
    ("hosts", "has_v6", "expected"),
    [
        (HERE, False, ("10.0.0.5", "172.17.0.1")),
        (HERE, True, ("10.0.0.5", "172.17.0.1", "fd00::2")),
        (["127.0.0.1", "fe80::1"], True, ()),
        ([f"10.0.0.{n}" for n in range(9)], False,
         ("10.0.0.5", "10.0.0.0", "10.0.0.1", "10.0.0.2")),
    ],
)  # fmt: skip
def test_what_others_can_dial(hosts, has_v6, expected):
    assert dialled_hosts(hosts, "10.0.0.5", has_v6=has_v6) == expected
    assert len(expected) <= HOSTS_MAX


@pytest.mark.parametrize(
    ("listen", "announce", "expected"),
    [
        ("tcp://0.0.0.0:0", None, ["10.0.0.5", "172.17.0.1"]),
        ("tcp://[::]:0", None, ["10.0.0.5", "172.17.0.1", "fd00::2"]),
        ("tcp://0.0.0.0:0", "tcp://my.host:0", ["my.host"]),
        ("tcp://10.0.0.5:0", None, ["10.0.0.5"]),
        ("tcp://my.host:0", None, ["10.0.0.5"]),
    ],
)
def test_a_wildcard_stands_for_this_machines_addresses(monkeypatch, listen, announce, expected):
    monkeypatch.setattr(module, "_hosts_here", lambda: HERE)
    listening = Address("tcp", ANN.peer, "10.0.0.5", 4001)
    found = own_addresses(listening, listen, announce)
    assert [(one.host, one.port) for one in found] == [(host, 4001) for host in expected]


def test_a_machine_on_a_switch_of_its_own_has_an_address(monkeypatch):
    monkeypatch.setattr(module, "own_address", lambda: None)
    monkeypatch.setattr(module, "_hosts_here", lambda: HERE)
    assert own_host() == "172.17.0.1"
    assert listen_near(None, None, 4270).host == "172.17.0.1"
    monkeypatch.setattr(module, "own_address", lambda: "10.0.0.5")
    assert own_host() == "10.0.0.5"


def test_a_ring_without_a_network_says_so(monkeypatch, capsys):
    monkeypatch.setattr(module, "own_address", lambda: None)
    monkeypatch.setattr(module, "_hosts_here", lambda: ["127.0.0.1", "::1"])
    assert listen_near(None, None, 4270).host == "127.0.0.1"
    assert "--listen tcp://HOST:PORT" in capsys.readouterr().err
    assert listen_near("tcp://127.0.0.1:1", None).port == 1
    assert listen_near(None, "127.0.0.1").host == "127.0.0.1"  # the starter's
    assert capsys.readouterr().err == ""


def test_what_nobody_could_dial_is_refused(monkeypatch):
    monkeypatch.setattr(module, "_hosts_here", lambda: ["127.0.0.1", "::1"])
    with pytest.raises(ConfigError, match="--announce tcp://HOST:PORT"):
        own_addresses(Address("tcp", ANN.peer, "127.0.0.1", 4001), "tcp://0.0.0.0:4001", None)
    loopback = Address("tcp", ANN.peer, "127.0.0.1", 4001)
    assert own_addresses(loopback, "tcp://127.0.0.1:4001", None) == (loopback,)
