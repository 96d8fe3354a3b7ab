"""Distributed start-up, the mesh, sharding rules, global arrays, FLOPs and the compile cache."""
