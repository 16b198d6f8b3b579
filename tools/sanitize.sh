#!/bin/sh
# Runs a small case of every CUDA operator under compute-sanitizer's four tools.
set -u
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # so that overruns and unwritten memory are seen
PYTHON=${PYTHON:-python3}
status=0
for tool in memcheck racecheck initcheck synccheck; do
  if compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" tools/sanitize_cases.py; then
    echo "$tool: clean"
  else
    echo "$tool: errors found"
    status=1
  fi
done
exit $status
