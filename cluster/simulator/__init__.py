"""The cluster on a virtual clock: the shipped router before many simulated replicas."""
