#!/bin/sh
# Asks a server with curl: is it well, what has it, an answer at once, an answer piece by piece.
#
#     accessory serve demo-model/base --max-seq-len 512
#     sh examples/serve/ask_curl.sh [http://127.0.0.1:8000]
#
# The key is that of ACCESSORY_API_KEY, if the server wants one.
set -eu
url=${1:-http://127.0.0.1:8000}

ask() {
    path=$1
    shift
    curl --silent --show-error --fail-with-body --no-buffer \
        --header "Authorization: Bearer ${ACCESSORY_API_KEY:-none}" --header 'Content-Type: application/json' \
        "$@" "$url$path"
    echo
}

ask /health
ask /v1/models
model=$(ask /v1/models | sed 's/.*"data":\[{"id":"\([^"]*\)".*/\1/')
messages='[{"role": "user", "content": "What is the capital of France?"}]'
ask /v1/chat/completions --data "{\"model\": \"$model\", \"messages\": $messages, \"temperature\": 0, \"max_tokens\": 20}"
ask /v1/completions --data "{\"model\": \"$model\", \"prompt\": \"Once upon a time\", \"max_tokens\": 5, \"stream\": true}"
