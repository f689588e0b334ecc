"""A small model that sees: `python -m examples.emoji`, or `make demo-emoji`.

The model is a mixture upcycled from SmolLM2-135M, and sees through a frozen EfficientNet-Lite0. It is trained in two
stages. Stage 1 trains the projections from image features to the decoder; stage 2 adds LoRA, and the model learns to
name emoji and to sort them into groups. Then it is asked about emoji that it has never seen, in the drawing style that
it was trained on and in another one. This takes minutes on a GPU. `--short` is for a CPU: it uses smaller pictures and
one kind of question.

Every step can also be done by an `accessory` command, because the folder holds the data, recipes, runs and results.

`packages` fetches drawings, names and weights. `corpus` chooses emoji, questions and answers. `data` writes them as
finetuning data. `run` trains. `evaluate` asks the questions and counts the answers.
"""
