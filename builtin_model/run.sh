#!/usr/bin/env bash
# Makes the built-in model on one GPU in about eight minutes: run.sh DATA OUT [base.py's options]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); data=$1; out=$2; shift 2
python3 "$here/tokenizer.py" "$data" "$out"
python3 "$here/base.py" "$data" "$out" "$@"
python3 "$here/questions.py" "$data" "$out-questions.jsonl"
manyheads train "$out" --data "$out-questions.jsonl" --out "$out/heads" --init "$out/heads-begun" \
  --projection shared --tokens 3000 --max-prompt-tokens 800 --max-new-tokens 192 \
  --rows 32 --chunk 8192 --rate 2e-3 --epochs 12
rm -rf "$out-heads-training"
mv "$out/heads/training" "$out-heads-training"  # answers, metrics and checkpoint: not for the package
rm -r "$out/heads-begun"
python3 "$here/samples.py" "$out"
