"""What the commands that need a model do; `accessory.cli` has their arguments."""
