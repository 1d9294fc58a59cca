"""How a command finds a cluster: state file, topology, environment."""

from __future__ import annotations

import pytest
import yaml

from cluster.errors import ClusterError, InvalidInput, TopologyError
from cluster.launcher import running, target
from cluster.launcher.running import NotRunning, Running
from cluster.settings import ClusterPaths

HOSTS = {
    "provider": {"type": "external", "module": "cluster.nodes.BareHostProvider"},
    "auth": {"ssh_user": "pdcluster"},
    "head_node_type": "head",
    "available_node_types": {
        "cpu": {"resources": {"CPU": 4}, "node_config": {"hosts": ["192.0.2.11"]}},
        "head": {"resources": {"CPU": 4}, "node_config": {"hosts": ["192.0.2.1"]}},
    },
}
LOCAL = {"provider": {"type": "local", "head_ip": "192.0.2.9", "worker_ips": ["192.0.2.10"]}}
HERE = {"provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []}}
CLOUD = {"provider": {"type": "aws", "region": "x"}}
TOKEN = {"PDCLUSTER_CONTROL_TOKEN": "t"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path


@pytest.fixture
def file(home):
    def write(ray, **serving):
        path = home / "t.yaml"
        spec = {
            "model": {"id": "simulated", "served_name": "glm"},
            "pools": [{"name": "p", "role": "mixed", "engine": "simulated"}],
            "islands": [{"name": "i", "pools": ["p"]}],
        }
        path.write_text(
            yaml.safe_dump({"cluster_name": "c", **ray, "metadata": {"serving": spec | serving}})
        )
        return path

    return write


def up_here(cluster="c", **more):
    paths = ClusterPaths(cluster)
    at = Running(
        cluster=cluster,
        phase="up",
        topology_file="/t.yaml",
        topology_digest="d",
        started_at_s=1.0,
        model="m",
        endpoint="http://127.0.0.1:8000",
        key_file=str(paths.api_key),
        control_url="http://127.0.0.1:8001",
        token_file=str(paths.state / "control-token"),
        ingress="direct",
    ).model_copy(update=more)
    running.write(paths, at)
    (paths.state / "control-token").write_text("the-token\n")
    paths.api_key.write_text("the-key\n")
    return at


WILD = {"control": {"host": "0.0.0.0"}, "gateway": {"host": "0.0.0.0"}}


@pytest.mark.parametrize(("ray", "head"), [(HOSTS, "192.0.2.1"), (LOCAL, "192.0.2.9")])
def test_from_elsewhere_the_head_is_where_the_file_says(file, ray, head):
    found = target.resolve(file(ray, **WILD), None, TOKEN)
    assert found.control().access.url == f"http://{head}:8001"
    assert found.endpoint_url == f"http://{head}:8000"
    assert (found.cluster, found.model, found.here) == ("c", "glm", None)


def test_an_address_that_is_stated_is_the_one_that_is_asked(file):
    spec = {"control": {"host": "192.0.2.77", "port": 9001}, "gateway": {"host": "2001:db8::1"}}
    found = target.resolve(file(HOSTS, **spec), None, TOKEN)
    assert found.control_url == "http://192.0.2.77:9001"
    assert found.endpoint_url == "http://[2001:db8::1]:8000"


def test_a_control_api_that_only_the_head_reaches_is_told_with_the_way_round(file):
    found = target.resolve(file(HOSTS), None, TOKEN)
    with pytest.raises(ClusterError) as told:
        found.control()
    assert "serving.control.host: 127.0.0.1 answers on the head alone" in str(told.value)
    assert "ssh -N -L 8001:127.0.0.1:8001 192.0.2.1" in str(told.value)
    assert "PDCLUSTER_CONTROL_URL=http://127.0.0.1:8001" in str(told.value)


def test_a_cloud_file_does_not_say_where_its_head_is(file):
    found = target.resolve(file(CLOUD, **WILD), None, TOKEN)
    with pytest.raises(ClusterError, match=r"PDCLUSTER_CONTROL_URL=http://HEAD:8001.*get-head-ip"):
        found.control()
    with pytest.raises(ClusterError, match="PDCLUSTER_ENDPOINT_URL=http://HEAD:8000"):
        found.endpoint()


def test_a_file_of_this_machine_alone_is_not_looked_for_elsewhere(file):
    with pytest.raises(NotRunning, match=r"cluster c does not run here.*pdcluster up FILE"):
        target.resolve(file(HERE), None, {})


def test_a_faulty_file_is_told_as_such(file):
    with pytest.raises(TopologyError, match="served_nam"):
        target.resolve(file(HOSTS, model={"id": "simulated", "served_nam": "x"}), None, {})


@pytest.mark.parametrize("way", ["only", "name", "file"])
def test_where_it_was_brought_up_the_state_file_says_all(file, way):
    at = up_here()
    path, name = (file(HOSTS) if way == "file" else None), ("c" if way == "name" else None)
    found = target.resolve(path, name, {})
    assert (found.here, found.control().access.url) == (at, "http://127.0.0.1:8001")
    assert found.token.read({}) == ("the-token", at.token_file)
    assert found.api_key.read({}) == ("the-key", at.key_file)
    assert found.endpoint().url == "http://127.0.0.1:8000"


def test_the_environments_addresses_come_before_all_others(file):
    up_here()
    given = {
        **TOKEN,
        "PDCLUSTER_CONTROL_URL": "https://proxy.example/pd/",
        "PDCLUSTER_ENDPOINT_URL": "http://127.0.0.1:18000",
    }
    for path in (None, file(HOSTS), file(HERE)):
        found = target.resolve(path, "c" if path is None else None, given)
        assert found.control().access.url == "https://proxy.example/pd"
        assert found.endpoint().url == "http://127.0.0.1:18000"


def test_with_an_address_in_the_environment_no_file_is_needed():
    given = {**TOKEN, "PDCLUSTER_CONTROL_URL": "http://h:1"}
    found = target.resolve(None, None, given)
    assert found.control().access.url == "http://h:1"
    with pytest.raises(NotRunning, match="PDCLUSTER_ENDPOINT_URL"):
        found.endpoint()
    with pytest.raises(InvalidInput, match="set PDCLUSTER_CONTROL_TOKEN"):
        target.resolve(None, None, {"PDCLUSTER_CONTROL_URL": "http://h:1"}).control()


@pytest.mark.parametrize("url", ["h:8001", "ftp://h", "http://", "/status"])
def test_a_variable_that_is_no_address_is_named(url):
    with pytest.raises(InvalidInput, match=r"PDCLUSTER_CONTROL_URL: found .*http://HOST:PORT"):
        target.resolve(None, None, {"PDCLUSTER_CONTROL_URL": url})


def test_the_token_is_looked_for_in_order(file, home):
    path = file(HOSTS, control={"host": "0.0.0.0", "token_env": "RACK_TOKEN"})
    found = target.resolve(path, None, {"RACK_TOKEN": "named"})
    assert found.token.read({"RACK_TOKEN": "named"}) == ("named", "RACK_TOKEN")
    both = {"RACK_TOKEN": "named", **TOKEN}
    assert found.token.read(both) == ("t", "PDCLUSTER_CONTROL_TOKEN")
    with pytest.raises(InvalidInput, match="RACK_TOKEN is not set here, nor is PDCLUSTER_CONTROL"):
        found.token.read({})

    (home / "token").write_text("filed\n")
    path = file(HOSTS, control={"host": "0.0.0.0", "token_file": str(home / "token")})
    assert target.resolve(path, None, {}).token.read({}) == ("filed", str(home / "token"))
    (home / "token").unlink()
    with pytest.raises(InvalidInput, match=r"token: cannot be read.*set PDCLUSTER_CONTROL_TOKEN"):
        target.resolve(path, None, {}).control()


def test_without_a_stated_token_the_message_names_the_file_on_the_head(file):
    found = target.resolve(file(HOSTS, **WILD), None, {})
    with pytest.raises(InvalidInput, match=r"pdcluster/c/control-token.*PDCLUSTER_CONTROL_TOKEN"):
        found.control()


def test_the_api_key_is_looked_for_likewise(file, home):
    path = file(HOSTS, **WILD | {"gateway": {"host": "0.0.0.0", "auth": {"keys_env": "KEYS"}}})
    found = target.resolve(path, None, {"KEYS": "k1,k2"})
    assert found.api_key.read({"KEYS": "k1,k2"}) == ("k1", "KEYS")
    assert found.api_key.read({"KEYS": "k1", "PDCLUSTER_API_KEY": "k"})[0] == "k"
    open_to_all = target.resolve(file(HOSTS, gateway={"auth": None}), None, {})
    assert open_to_all.api_key.read({}) == (None, "")


def test_a_tilde_in_the_name_of_a_secrets_file_is_the_home(file, home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    (home / "token").write_text("filed\n")
    path = file(HOSTS, control={"host": "0.0.0.0", "token_file": "~/token"})
    assert target.resolve(path, None, {}).token.read({})[0] == "filed"


def test_a_restart_is_waited_for_only_where_ray_is_known_to_live():
    at = up_here(ray_address="127.0.0.1:6379")
    assert target.of_running(at, {}).control().access.patience_s > 10
    starting = at.model_copy(update={"phase": "starting"})
    assert target.of_running(starting, {}).control().access.patience_s == 0


@pytest.mark.parametrize(
    ("user", "said"),
    [("ada", "ada@ops"), ("\u00e4da b\x1b", "?da?b?@ops"), ("x" * 200, "x" * 128)],
)
def test_who_asks_is_user_and_host_as_a_header_can_carry_it(file, monkeypatch, user, said):
    monkeypatch.setattr("getpass.getuser", lambda: user)
    monkeypatch.setattr("socket.gethostname", lambda: "ops")
    found = target.resolve(file(HOSTS, control={"host": "192.0.2.1"}), None, TOKEN)
    assert found.control().access.asked_by == said


def test_a_user_without_a_name_is_told_by_number(file, monkeypatch):
    def nameless():
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nameless)
    monkeypatch.setattr("os.getuid", lambda: 12345)
    found = target.resolve(file(HOSTS, control={"host": "192.0.2.1"}), None, TOKEN)
    assert found.control().access.asked_by.startswith("uid-12345@")
