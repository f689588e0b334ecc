"""Limits of kernels, graphs and blocks: sizes at which another method becomes quicker, measured on an H100 or H200.
Then limits of arguments.

`benchmarks/README.md` has the measurements. `ops.dispatch` and the engine decide by these numbers, and the planner
counts with them. This file imports only the standard library.
"""

from __future__ import annotations

# (token, expert) pairs up to which experts' weights are read in place, pair by pair. With more pairs, this reads a
# weight several times, while a grouped product reads it once. On a CPU, sorting so few tokens for a grouped product
# costs more than it saves.
DECODE_PAIRS_CPU = 4
DECODE_PAIRS_GPU = 8
DECODE_PAIRS_GPU_QUANTIZED = 12  # grouped products of quantised weights are slower, so the limit is higher

# (token, expert) pairs up to which experts run in tiles of few rows, with SiLU and the sum over experts in the same
# kernels. With more, products for prompts are quicker.
TILED_PAIRS = 1024
TILED_PAIRS_4_BITS = 512
# Pairs up to which reading a dense weight for each pair is quicker than that: they rarely share an expert.
IN_PLACE_PAIRS = 4
# Experts up to which the router's products fit the registers of the program that norms a token.
ROUTED_EXPERTS = 64

# Rows of input up to which a GPU reads a quantised weight without tensor cores.
IN_PLACE_ROWS = 1
# Rows of input up to which a GPU multiplies a dense weight without tensor cores. Already with four, cuBLAS is quicker.
IN_PLACE_ROWS_DENSE = 1
# Rows of input up to which a quantised weight's scales are applied to sums, which makes the loop over it the quickest.
FEW_ROWS = 64
# Rows of input (for stacked experts: average rows per expert) up to which a quantised weight is dequantised tile by
# tile inside the product. With more rows, each tile is dequantised so often that a pass before the product is quicker.
TILED_ROWS = 128
TILED_ROWS_AN_EXPERT = 256

# On a CPU: rows of input up to which torch's product reads int8 in place, and up to which the sums of 4-bit groups are
# scaled, where the CPU has AMX. With more rows it is quicker to convert the weight, a block at a time.
INT8_ROWS_CPU = 8
GROUP_SUM_ROWS_CPU = 4
# Numbers of such a block, which bf16 holds in 4 MiB: each product takes 25 µs to begin. And how many are looked up at a
# time: their indices and the table are in a core's second cache.
BLOCK_NUMBERS_CPU = 2**21
LOOKUP_NUMBERS_CPU = 2**17

# On a CPU, where a row's bits must not depend on the others: rows of a block, by the bytes of a number. Blocks while
# decoding are those that take hardly longer than one row; blocks of prompts are larger. Measured on two cores (AMX):
# a weight of 4096 x 4096 takes in bf16 0.75 ms for one row, 1.04 for 8, 1.98 for 64; in fp32 1.25, 1.29 for 2, 8.97.
FIXED_ROWS_CPU = {"decode": {2: 8, 4: 2}, "prompt": {2: 64, 4: 64}}

# Tokens of a page of the key/value cache.
PAGE_SIZE = 64
# Rows up to which dense experts in 16 bits take our own grouped product: at 16 to 128 rows it reads the weights at 0.97
# to 1.01 of the copy rate's time, torch's at 1.12 to 1.25. At 512 rows torch's is the quicker one.
GROUPED_ROWS = 256
# Average rows per expert up to which dense experts in fp32 are one grouped product on a GPU. It has no tensor cores.
# With more rows a loop over the experts is quicker, although it waits for the host. Not measured yet:
# `accessory tune` times the product.
GROUPED_ROWS_AN_EXPERT_FP32 = 128
# Rows of input up to which each row reads the matrices of its own LoRA adapter. With more rows, they are sorted by
# adapter for a grouped product. Not measured yet: benchmarks/gpu_choices.py times both.
ADAPTER_ROWS = 64

# Logits that a rank's head makes at a time while it is trained: 256 MB in 16 bits, 4194 rows of Mixtral's vocabulary.
# And the rows of them that a CPU's cross-entropy widens to fp32 at a time.
LOGITS_AT_ONCE = 2**27
CROSS_ENTROPY_ROWS = 1024
# (token, expert) pairs of which training makes at a time what it does not keep of the experts: 470 MB a tensor of
# Mixtral-8x7B's hidden size in 16 bits. A piece reads and writes the gradients of its experts again: beside
# torch's grouped products, four pieces of 8192 gained 3 % less on an H100 than one of 32,768 did in another run.
TRAINED_PAIRS_AT_ONCE = 16384
# Numbers that a GPU quantises at a time while a weight is loaded.
QUANTIZED_AT_ONCE_GPU = 2**24
# The fewest and the most numbers of a parameter that our own kernel of AdamW updates. A launch for each smaller one
# takes the host longer than the card; torch updates many in one. Calculated: 28 bytes a number, 4.2 TB/s, 20 µs each.
ADAMW_NUMBERS = (2**22, 2**62)
# Numbers that the optimiser updates at a time where it widens gradients or fetches moments from the host, and how many
# such pieces are on their way at once: one comes, one is updated, one goes. Not measured.
OPTIMIZER_PIECE = 2**23
PIECES_ON_THE_WAY = 3

# The largest seed: torch's and numpy's generators both take what fits 64 bits with a sign.
LARGEST_SEED = 2**63 - 1
# How many times as many positions as a network was made for may be asked for. Rotary embedding has been extrapolated so
# far (YaRN, arXiv 2309.00071), and no further.
EXTRAPOLATION = 32

# The rows of decoding's CUDA graphs: one is captured for each of these numbers of sequences. What is above a step's
# sequences is computed for nothing.
GRAPH_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 112, 128, 160, 192, 224, 256)
# The graphs of steps with prompts: one is captured for each of these numbers of their tokens, beside each of these
# numbers of sequences that decode, up to so many tokens in all. With more, a card computes for as long as the host
# launches. And the prompts that such a step has at most.
GRAPH_TOKENS = (32, 64, 128, 192, 256, 384, 512, 768, 1024)
GRAPH_DECODES = (0, 16, 64, 128, 256)
GRAPH_MOST_TOKENS = GRAPH_TOKENS[-1]
GRAPH_PROMPTS = 32
# Sequences that run at once, and the most tokens of a step.
MAX_RUNNING_CPU, MAX_RUNNING_GPU = 32, 256
STEP_TOKENS_CPU, STEP_TOKENS_GPU = 512, 4096
# Requests that wait at once. A waiting request is only its ids, but the last of so many waits until 32 times as many as
# a GPU runs at once have been answered: a caller had better hear so. Not measured.
MAX_WAITING = 8192

# Numbers of a sum over the GPUs of one host up to which every rank reads all parts itself, and up to which ranks sum a
# slice each. Larger sums take NCCL.
ONE_SHOT_NUMBERS = 2**16
TWO_SHOT_NUMBERS = 2**20
# Numbers that a rank may send to the others where the next norm sums a layer's output, in the same launch, and the
# longest row of them: a program holds a row in registers.
EXCHANGED_NUMBERS = 2**18
EXCHANGED_DIM = 4096
