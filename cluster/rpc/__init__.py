"""The versioned gRPC protocol (`inference.proto`), its generated code and mappings."""
