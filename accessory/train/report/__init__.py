"""`report.html`: what a training run did, read from its `metrics.jsonl` and shown as one page."""
