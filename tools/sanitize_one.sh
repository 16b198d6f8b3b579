#!/bin/sh
# Runs a Python program under one of compute-sanitizer's tools, in place. The log ends with the exit
# status, which is not 0 where the tool has found something.
# Usage: tools/sanitize_one.sh TOOL LOG PROGRAM [ARGUMENT...]
set -u
tool=$1
log=$2
shift 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # so that overruns and unwritten memory are seen
compute-sanitizer --tool "$tool" --error-exitcode 9 "${PYTHON:-python3}" "$@" >"$log" 2>&1
echo "exit status $?" >>"$log"
