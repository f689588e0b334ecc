"""From one whole checkpoint to another, or to a report about it: what the commands on checkpoints do."""
