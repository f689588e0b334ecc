"""The memory plan of a task: which GPUs it fits, by arithmetic on a configuration. Nothing here imports torch."""
