"""A bursty trace over simulated engines in virtual time, once per way of scaling.

trace ─▶ fleet (engines, routing) ─▶ measure ─▶ scalers ─▶ fleet; afterwards: report, plot
"""
