"""The SLO autoscaler: `policy.decide` says what to change, from `signals`, as a `decision`."""
