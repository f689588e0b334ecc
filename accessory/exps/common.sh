# What the recipes of exps/ share. A recipe sources this file, which takes the recipe's arguments, and calls run_finetune.
#
# It works the same in every task of srun, in every rank of torchrun --no-python, and alone. Environment:
#   OUTPUT_DIR  where the run goes, instead of output/<name of the recipe>
#   PYTHON      the interpreter, instead of python
# shellcheck shell=bash
set -euo pipefail

if [ "$#" -lt 3 ]; then
    echo "usage: bash $0 PRETRAINED_PATH LLAMA_CONFIG TOKENIZER_PATH [flags of main_finetune.py]" >&2
    exit 2
fi
pretrained_path=$1
# shellcheck disable=SC2034 # recipes hand it on, with files of their own
llama_config=$2
tokenizer_path=$3
shift 3
more=("$@") # later flags win, so these may change anything
accessory=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# run_finetune NAME [flags]: what all recipes have in common, then the flags of this one.
run_finetune() {
    local name=$1
    shift
    local output=${OUTPUT_DIR:-output/$name}
    mkdir -p "$output"
    if [ "${RANK:-${SLURM_PROCID:-0}}" = 0 ]; then
        echo "exp name: $name"
    fi
    # exec: signals of Slurm and torchrun reach Python, which then saves its state; tee goes on until all is written.
    exec "${PYTHON:-python}" -u "$accessory/main_finetune.py" \
        --output_dir "$output" --epochs 1 --warmup_epochs 0.1 \
        --max_words 4096 --num_workers 2 \
        --min_lr 0.0 --clip_grad 2 --weight_decay 0.0 \
        --data_parallel sdp --precision bf16 --checkpointing \
        --tokenizer_path "$tokenizer_path" --no_visual \
        --pretrained_path "$pretrained_path" \
        --data_config configs/data/finetune/sg/dialog_ultrachat200kWizardcode.yaml --dialog \
        --save_iteration_interval 100 --resume auto \
        "$@" ${more[@]+"${more[@]}"} \
        > >(
            trap '' INT TERM
            exec tee -a "$output/output.log"
        ) 2>&1
}
