"""How a network is cut up between ranks and shards."""
