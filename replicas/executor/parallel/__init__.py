"""Tensor parallelism: one model on several devices of a machine, a process for each."""
