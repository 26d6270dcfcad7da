"""Rewards in other processes: the client, the wire and the server."""
