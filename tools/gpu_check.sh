#!/bin/sh
# Builds in place and runs every file of tests/gpu at once, on a machine with a GPU; property tests
# draw new cases every time, or those of SEED.
# Usage: [SEED=NUMBER] tools/gpu_check.sh [LOG_FOLDER]
set -u
PYTHON=${PYTHON:-python3}
logs=${1:-build/gpu-logs}
mkdir -p "$logs"
RTPURBO_CUDA=1 "$PYTHON" setup.py -q build_ext --inplace >"$logs/build.log" 2>&1 || {
  tail -30 "$logs/build.log"
  exit 1
}
draws="--hypothesis-profile=fresh --hypothesis-seed=${SEED:-$(date +%s)}"
for file in tests/gpu/test_*.py; do
  log="$logs/$(basename "$file" .py).log"
  (
    # shellcheck disable=SC2086
    OMP_NUM_THREADS=2 "$PYTHON" -m pytest -p no:cacheprovider --tb=short $draws "$file" >"$log" 2>&1
    echo "exit status $?" >>"$log"
  ) &
done
wait
status=0
for log in "$logs"/test_*.log; do
  printf '%s: %s\n' "$(basename "$log" .log)" "$(tail -2 "$log" | tr '\n' ' ')"
  [ "$(tail -1 "$log")" = "exit status 0" ] || status=1
done
echo "The same draws: python -m pytest $draws tests/gpu/test_properties_cuda.py"
exit $status
