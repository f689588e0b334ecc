"""A small model that sees: `python -m examples.emoji`, or `make demo-emoji`.

The mixture grown from SmolLM2-135M gets EfficientNet-Lite0's features of emoji, learns first to take them for words,
then, with LoRA, to name and sort what it sees; it is asked about emoji that it has never seen, in the drawing style
that it knows and in another one. Minutes on a GPU; `--short` is for a CPU: smaller pictures, one kind of question.
Nothing is done that a command could not do: the folder holds data, recipes, runs and results.

`packages` fetches, `corpus` says what is learnt, `data` writes it, `run` trains, `evaluate` asks.
"""
