"""Executors: what turns a step's batch into sampled tokens, behind one interface (`base`)."""
