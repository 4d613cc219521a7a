"""The node-wide KV store: one shared-memory segment per node, a cache of KV blocks by content."""
