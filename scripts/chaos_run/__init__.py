"""Random faults under traffic: what `scripts/chaos.py` runs, and the failure tests lean on.

schedule    which faults, in which order: a pure function of the seed
clusters    the topologies that are tormented
home        one cluster in folders of its own, through the real CLI; its processes by kind
asks        what clients ask: a pure function of seed, client and turn
answers     an answer as a client makes sense of it, and how it differs from another one (pure)
traffic     clients that ask, one after the other, and keep a record of each answer
reference   what an undisturbed engine says
targets     whom a fault may hit
shape       how many serve in which role, and which changes leave enough of each (pure)
faults      how each kind of fault is done to the cluster, and undone
resources   what a cluster holds: processes, ports, leases, actors, placement groups
run         all of it, from `up` to `down`
report      what came of it, as a table and as JSON
"""
