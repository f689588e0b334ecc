"""Run and finetune Mixtral-8x7B: two interchangeable mixture-of-experts implementations, any checkpoint layout.

Nothing heavy is imported here: `accessory --help` must answer at once.
"""

__version__ = "0.1.0"
