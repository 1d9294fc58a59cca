"""An engine that does everything to be left behind. Prints `up PORT` when all of it stands.

Its children sit in sessions of their own, forked twice, ignore SIGTERM and SIGHUP, listen, and map
segments in /dev/shm. Arguments: NAME (of its segments and of nothing else), then words:
`dies` ends the first process with code 3 once the rest stands.
"""

import mmap
import os
import signal
import socket
import sys
import time


def segment(name):
    fd = os.open(f"/dev/shm/{name}", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, 4096)
    mapped = mmap.mmap(fd, 4096)
    os.close(fd)
    return mapped


def stubborn():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def daemon(name, report_fd):
    """Forked twice, with a session of its own: nobody's child but the subreaper's."""
    if os.fork():
        os.wait()
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    stubborn()
    held = segment(name)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    os.write(report_fd, b"%d\n" % listener.getsockname()[1])
    if os.fork() == 0:
        held = segment(name + "-deep")
        os.write(report_fd, b"0\n")
    time.sleep(600)
    del held, listener


def main():
    name, *words = sys.argv[1:]
    stubborn()
    held = segment(name + "-root")
    read_fd, write_fd = os.pipe()
    daemon(name, write_fd)
    lines = b""
    while lines.count(b"\n") < 2:
        lines += os.read(read_fd, 100)
    port = max(int(line) for line in lines.split())
    print(f"up {port}", flush=True)
    if "dies" in words:
        print("last words", flush=True)
        os._exit(3)
    time.sleep(600)
    del held


main()
