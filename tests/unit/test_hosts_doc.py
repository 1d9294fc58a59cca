"""docs/hosts.md: what it shows is true."""

from __future__ import annotations

import re
from pathlib import Path

from cluster.launcher.validate import validate
from cluster.nodes.doctor import judge
from cluster.nodes.doctor.expect import survey
from cluster.workers.ports import DEFAULT_WINDOW

TEXT = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text()


def test_its_topology_is_valid_and_each_host_gets_its_image(tmp_path):
    (snippet,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.M | re.S)
    path = tmp_path / "rack.yaml"
    path.write_text(snippet)
    hosts = survey(validate(path), is_this_machine=False).hosts
    images = {plan.address: plan.container.image for plan in hosts if plan.container}
    assert images == {
        "10.0.0.1": "pdcluster:cpu",
        "10.0.0.11": "pdcluster:cuda",
        "10.0.0.21": "pdcluster:ascend-a3",
    }


def test_every_check_is_explained():
    explained = set(re.findall(r"[\w/ ]+", re.sub(r"^\| check.*$", "", TEXT, flags=re.M)))
    names = {name.strip() for name in explained}
    said = set()
    for name in ("judge", "judge_models", "compare"):
        source = (Path(judge.__file__).parent / f"{name}.py").read_text()
        said |= set(re.findall(r'"(?:error|warning)", "([\w ]+)"', source))
        said |= set(re.findall(r'"(?:error|warning)", \w+, "([\w ]+)"', source))
    assert {"shared memory", "versions", "ssh", "ports"} <= said
    assert said <= names


def test_its_numbers_are_those_of_the_code():
    assert f"{DEFAULT_WINDOW.start}-{DEFAULT_WINDOW.stop - 1}" in TEXT
    assert f"`nofile` {judge._OPEN_FILES_WANTED}" in TEXT
    assert f"`nofile` below {judge._OPEN_FILES_NEEDED}" in TEXT
    assert f"{judge._SHM_PER_RANK // 2**20} MiB per rank" in TEXT
