"""What Grafana's HTTP API is asked to hold: a folder, a data source, dashboards, alert rules.

client   one Grafana: requests, and what its refusals become
alerts   our alert rules as Grafana's own
push     found against wanted, and what is written; a second push writes nothing
"""
