"""Cuts a network between ranks and shards."""
