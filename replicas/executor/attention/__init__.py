"""Paged attention: one pool (`pool`), one interface (`base`), and the backends behind it.

`sdpa` runs anywhere, `triton_backend` and `flash` on NVIDIA GPUs; `choice` picks one.
"""
