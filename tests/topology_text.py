"""The smallest whole topology file, and the parts of it that tests take out or change."""

BASE = """\
cluster_name: t
max_workers: 0
provider: {type: local, head_ip: 127.0.0.1, worker_ips: []}
metadata:
  serving:
    model: {id: simulated}
    pools:
      - name: prefill
        role: prefill
        engine: simulated
      - name: decode
        role: decode
        engine: simulated
    islands:
      - name: one
        pools: [prefill, decode]
    gateway:
      port: 8000
"""
PREFILL = "      - name: prefill\n        role: prefill\n        engine: simulated\n"
DECODE = "      - name: decode\n        role: decode\n        engine: simulated\n"
GATEWAY = "    gateway:\n      port: 8000\n"
