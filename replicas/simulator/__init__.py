"""A discrete-event executor on a virtual clock: the shipped engine and policies, without a GPU."""
