"""The node-wide KV store: one shared-memory segment per node and the ownership of its slots."""
