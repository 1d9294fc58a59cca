"""What runs on a host: sent there as text, standard library only, Python 3.8 and later.

    talk      questions in, answers out, and an end when nobody asks any more
    system    Python, devices, drivers, memory, limits, ports, container
    disk      room, rights, models
    reach     connections between hosts
    commands  a host's own programs, for a bounded time

Nothing here changes a host or decides anything.
"""
