"""Measuring: how quickly a card runs the network, against what the card could do at best and against other programs."""
