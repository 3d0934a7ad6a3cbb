"""The live node: engine, residency, KV, deploy adapter and server."""
