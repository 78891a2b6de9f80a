#!/usr/bin/env bash
# Makes the built-in model on one GPU in about eight minutes: run.sh DATA OUT [base.py's options]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); data=$1; out=$2; shift 2
python3 "$here/tokenizer.py" "$data" "$out"
python3 "$here/base.py" "$data" "$out" "$@"
python3 "$here/heads.py" "$data" "$out"
python3 "$here/samples.py" "$out"
