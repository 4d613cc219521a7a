"""The replica engine: scheduler, block pool, executor and loop. Imports no Ray."""
