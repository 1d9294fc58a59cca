"""The OpenAI-compatible endpoint.

hosting    start and stop: plain Ray actors or Ray Serve
app        ASGI entry: authenticate, read, dispatch
exchange   one request: render, route, prefill, decode, recover
plan       pure: which flow a request takes
route      pure: which workers take it
fleet      what this replica knows of the workers: snapshot, own load, held blocks
render     prompt to token ids, once; templates is its local half
upstream   HTTP to engines
requests   the edge: JSON in, validated request out
admission, auth, cutoff, errors, source, config   one thing each, as they are called
"""
