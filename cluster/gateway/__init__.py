"""The OpenAI-compatible endpoint.

hosting    start and stop: plain Ray actors or Ray Serve
app        ASGI entry: authenticate, read, dispatch
exchange   one request: render, route, have a pair answer, recover
attempt    one request at one pair: prefill and decode (orders), the answer (answer)
plan       pure: which flow a request takes
route      pure: which workers take it
recovery   pure: what is tried next; course: how an answer goes on with another engine
leaving    pure: which workers a snapshot lets go of; quarantine keeps suspects apart
fleet      what this replica knows of the workers: snapshot, own load, held blocks
render     prompt to token ids, once; templates is its local half
upstream   HTTP to engines; liveness notices that a host is cut off
tally      what the controller is told of the traffic (reports), and of how workers serve
           (standing); story: what the log is told
requests   the edge: JSON in, validated request out
admission, auth, cutoff, errors, source, config   one thing each, as they are called
"""
