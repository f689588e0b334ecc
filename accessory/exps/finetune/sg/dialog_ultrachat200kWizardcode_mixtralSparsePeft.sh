#!/bin/bash
# LoRA, bias and norm tuning of Mixtral-8x7B, sparse implementation: 16 GPUs = 4 model-parallel × 4 data-parallel.
# From accessory/, with the converted folder and its two files:
#   srun -n16 --gres=gpu:8 --ntasks-per-node=8 bash exps/finetune/sg/dialog_ultrachat200kWizardcode_mixtralSparsePeft.sh \
#       /path/to/converted_sparse /path/to/converted_sparse/config.json /path/to/converted_sparse/tokenizer.model
# Without Slurm, on every machine: torchrun --nnodes=2 --nproc-per-node=8 --rdzv-endpoint=HOST:PORT --rdzv-backend=c10d \
#       --no-python bash exps/…, then the same arguments. Flags of main_finetune.py may follow them.

# shellcheck source-path=SCRIPTDIR source=../../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"

run_finetune finetune/sg/dialog_ultrachat200kWizardcode_mixtralSparsePeft \
    --llama_type mixtral_sparse_peft --llama_config "$llama_config" configs/model/finetune/sg/llamaPeft_normBiasLora.json \
    --model_parallel_size 4 --batch_size 8 --accum_iter 8 --lr 0.00002
