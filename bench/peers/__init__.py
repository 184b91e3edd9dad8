"""Other engines on the same work: one module a peer, each in a virtual environment of its own.

    python -m bench.peers [--only llama_cpp,onnxruntime] [--repeats 3]

Knows how contestants are asked in turns and compared; each peer's module knows that peer. A peer's module imports nothing
but the standard library at the top: it is read here for its requirements and run there by `bench.peers.serve`.
"""
