"""What a benchmark can be pointed at: servers by HTTP or gRPC, the engine, the simulator."""
