#!/usr/bin/env bash
# Trains heads for the built-in base as it is in the package: heads.sh DATA OUT [options of manyheads train]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); data=$1; out=$2; shift 2
python3 "$here/questions.py" "$data" "$out-questions.jsonl"
manyheads train builtin --data "$out-questions.jsonl" --out "$out" --init builtin --projection shared \
  --max-prompt-tokens 800 --max-new-tokens 192 --rows 32 --chunk 8192 --rate 1e-3 --epochs 2 "$@"
