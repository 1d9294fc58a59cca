"""The same cluster behind Ray Serve and its HAProxy: the default ingress."""

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.e2e, pytest.mark.slow]


def test_a_cluster_behind_serve_comes_up_answers_and_leaves_nothing(home):
    def edit(serving):
        serving["gateway"]["ingress"] = "serve"

    topology = home.topology("it-serve", edit)
    try:
        home.run("up", str(topology))
        text = " ".join(f"word{n}" for n in range(60))
        said = home.json("chat", text, "--cluster", "it-serve")
        assert (said["prefill"], said["decode"]) == ("prefill/0", "decode/0")
        assert any("haproxy" in process.name() for process in home.processes("it-serve"))
    finally:
        home.run("down", str(topology))
    assert home.leftovers("it-serve") == []
