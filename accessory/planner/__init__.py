"""What fits which GPUs: plain arithmetic on a configuration, without torch."""
