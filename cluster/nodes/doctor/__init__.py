"""Are the hosts of a topology fit for it? `pdcluster doctor` looks, and changes nothing there.

expect    topology ─▶ Survey: what each host must have, which hosts must reach each other (pure)
probe     runs on a host, sent over ssh, standard library only ─▶ JSON
facts     that JSON ─▶ Facts; what is odd or missing is "not known" (pure)
session   one conversation with one host's probe
examine   all hosts at once: Survey ─▶ Examination
judge     one host: HostPlan, Facts ─▶ findings (pure)
compare   hosts beside each other and beside the operator's machine ─▶ findings (pure)
"""
