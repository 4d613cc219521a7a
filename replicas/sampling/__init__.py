"""Sampling: per-request parameters, the batched sampler, stop conditions."""
