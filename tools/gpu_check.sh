#!/bin/sh
# Builds in place and runs every file of tests/gpu at once, on a machine with a GPU.
# Usage: tools/gpu_check.sh [LOG_FOLDER]
set -u
PYTHON=${PYTHON:-python3}
logs=${1:-build/gpu-logs}
mkdir -p "$logs"
RTPURBO_CUDA=1 "$PYTHON" setup.py -q build_ext --inplace >"$logs/build.log" 2>&1 || {
  tail -30 "$logs/build.log"
  exit 1
}
for file in tests/gpu/test_*.py; do
  log="$logs/$(basename "$file" .py).log"
  (
    OMP_NUM_THREADS=2 "$PYTHON" -m pytest -p no:cacheprovider --tb=short "$file" >"$log" 2>&1
    echo "exit status $?" >>"$log"
  ) &
done
wait
status=0
for log in "$logs"/test_*.log; do
  printf '%s: %s\n' "$(basename "$log" .log)" "$(tail -2 "$log" | tr '\n' ' ')"
  [ "$(tail -1 "$log")" = "exit status 0" ] || status=1
done
exit $status
