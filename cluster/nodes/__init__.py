"""Hosts without a cloud: the node provider for `ray up`, and the doctor that looks at hosts."""
