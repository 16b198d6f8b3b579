#!/bin/sh
# Runs a small case of every CUDA operator under compute-sanitizer's four tools, at once, in place.
# Usage: tools/sanitize.sh [LOG_FOLDER]
set -u
PYTHON=${PYTHON:-python3}
logs=${1:-build/sanitizer-logs}
mkdir -p "$logs"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # so that overruns and unwritten memory are seen
for tool in memcheck racecheck initcheck synccheck; do
  (
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" tools/sanitize_cases.py \
      >"$logs/$tool.log" 2>&1
    echo "exit status $?" >>"$logs/$tool.log"
  ) &
done
wait
status=0
for tool in memcheck racecheck initcheck synccheck; do
  log="$logs/$tool.log"
  printf '%s: %s\n' "$tool" "$(tail -2 "$log" | tr '\n' ' ')"
  [ "$(tail -1 "$log")" = "exit status 0" ] || status=1
done
exit $status
