#!/bin/bash
# Full finetune of Mixtral-8x7B, sparse implementation: 32 GPUs = 8 model-parallel × 4 data-parallel.
# From accessory/, with the converted folder and its two files:
#   srun -n32 --gres=gpu:8 --ntasks-per-node=8 bash exps/finetune/sg/dialog_ultrachat200kWizardcode_mixtralSparse.sh \
#       /path/to/converted_sparse /path/to/converted_sparse/config.json /path/to/converted_sparse/tokenizer.model
# Without Slurm, on every machine: torchrun --nnodes=4 --nproc-per-node=8 --rdzv-endpoint=HOST:PORT --rdzv-backend=c10d \
#       --no-python bash exps/…, then the same arguments. Flags of main_finetune.py may follow them.

# shellcheck source-path=SCRIPTDIR source=../../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"

run_finetune finetune/sg/dialog_ultrachat200kWizardcode_mixtralSparse \
    --llama_type mixtral_sparse --llama_config "$llama_config" \
    --model_parallel_size 8 --batch_size 4 --accum_iter 8 --lr 0.000005
