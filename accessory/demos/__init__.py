"""Demos for newcomers: a first run, a first finetune, and web pages."""
