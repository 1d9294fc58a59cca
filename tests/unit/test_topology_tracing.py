"""`observability.tracing`: what may be written, and whom a change of it concerns."""

from __future__ import annotations

import pytest
from control_world import desired, serving

from cluster.control import rollout
from cluster.gateway.config import GatewayConfig
from cluster.launcher import plan
from cluster.topology.tracing import TracingSpec

TRACING = {"otlp_endpoint": "http://127.0.0.1:4318"}


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c/otel", "https://c/otel/v1/traces"),
        ("http://c:4318/v1/traces", "http://c:4318/v1/traces"),
    ],
)
def test_the_collectors_address_is_its_base(written: str, url: str):
    assert TracingSpec(otlp_endpoint=written).traces_url == url


@pytest.mark.parametrize(
    "written", ["c:4318", "grpc://c", "http://", "http://u:secret@c", "http://c?token=x"]
)
def test_an_address_that_is_none_or_holds_a_secret_is_refused(written: str):
    with pytest.raises(ValueError, match="otlp_endpoint"):
        TracingSpec(otlp_endpoint=written)


def test_gateways_are_told_and_it_is_off_unless_written():
    assert GatewayConfig.of("c", serving(), "/m", None, "").tracing is None
    traced = serving(observability={"tracing": TRACING})
    told = GatewayConfig.of("c", traced, "/m", None, "").tracing
    assert told == TracingSpec(otlp_endpoint="http://127.0.0.1:4318", sample_ratio=1.0)


@pytest.mark.parametrize("was", [None, {**TRACING, "sample_ratio": 0.5}])
def test_a_running_endpoint_keeps_its_tracing_and_says_so(was):
    before, after = (desired(observability={"tracing": said}) for said in (was, TRACING))
    assert all(key.startswith("observability.tracing") for key in plan.needs_restart(before, after))
    assert plan.needs_restart(before, after)
    (refused,) = rollout.plan(before, after.serving).refused
    assert "observability.tracing" in str(refused)
    assert "the endpoint is started with it" in str(refused)
