"""The `simulated` engine: vLLM's HTTP API, KV transfer, KV events and metrics, without a model.

python -m cluster.engines.simulated --config FILE | --config-json JSON

__main__   command line, loading, signals
config     what the engine is told, validated
server     HTTP routes, authentication, errors
protocol   requests parsed and checked
answers    answers and stream chunks built
stops      stop strings in a stream of text
engine     admission, prefill, decode: one request's life
model      token ids and text as pure functions of what came before
kv         block cache: prefix hashing, LRU, pins under a lease
handover   whose blocks are whose between two engines, by dialect; made of
  grants        what prefill keeps for a peer, under a lease
  pull          decode takes it: nixl, mooncake, ascend_mooncake, sglang_*
  push          prefill brings it: ascend_layerwise
  side_channel  the server both are spoken to through
  frames        how they speak
request    one sequence, one step of it
events     KV cache events over ZMQ, with replay
metrics    Prometheus text under vLLM's names
ranks      the nodes of a replica that spans several
core       a second process, where one is asked for
faults     what a test may break
adapter    how pdcluster starts it (engines.base.EngineAdapter)
"""
