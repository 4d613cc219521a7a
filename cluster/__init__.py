"""Ray appears here: the Serve application, its ingress and router, and the command line."""
