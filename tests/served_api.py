"""The control API of fake controllers: in this process, or at a real port."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

from cluster.control.api_server import ApiServer
from cluster.control.store import ApiAccess


class InPlaceOf:
    """Hands on to the controller of the test that runs: to make an app takes 0.2 s."""

    def __init__(self):
        self.controller = None

    def __getattr__(self, name):
        return getattr(self.controller, name)


class Served:
    """An ApiServer in a thread of its own."""

    def __init__(self, controller, port, token):
        self.server = ApiServer(controller, ApiAccess("127.0.0.1", port, token))
        self.loop = asyncio.new_event_loop()
        self.task = self.loop.create_task(self.server.run())
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        with contextlib.suppress(asyncio.CancelledError):
            self.loop.run_until_complete(self.task)
        self.loop.close()

    def wait_until(self, is_so, within_s=60.0):
        deadline_s = time.monotonic() + within_s
        while not is_so():
            assert time.monotonic() < deadline_s, self.server.problem
            time.sleep(0.01)

    def end(self):
        self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join(10)
        assert not self.thread.is_alive()
