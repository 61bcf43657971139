"""Mesh, sharding rules and (later) everything that spans devices."""
