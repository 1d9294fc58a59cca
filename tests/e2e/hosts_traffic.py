"""Requests without end, run on the operator's host: one line of JSON per request and its outcome.

python3 hosts_traffic.py URL FILE THREADS        until FILE.stop exists
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import urllib.request
from pathlib import Path


def ask(url: str, number: int) -> dict[str, object]:
    body = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": f"Count from {number} upwards."}],
        "max_tokens": 24,
        "temperature": 0,
    }
    headers = {
        "content-type": "application/json",
        "authorization": f"Bearer {os.environ['PDCLUSTER_API_KEY']}",
    }
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    begun_s = time.time()
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            answer.read()
            said = dict(answer.headers)
        outcome = {"ok": True, "decode": said["x-pdcluster-decode"]}
    except OSError as error:
        outcome = {"ok": False, "why": str(error)}
    return {"begun_s": begun_s, "ended_s": time.time(), **outcome}


def main() -> None:
    url, file, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    stop = file.with_name(f"{file.name}.stop")
    lock = threading.Lock()

    def work(first: int) -> None:
        number = first
        while not stop.exists():
            line = json.dumps(ask(url, number))
            number += threads
            with lock, file.open("a") as log:
                log.write(line + "\n")

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
