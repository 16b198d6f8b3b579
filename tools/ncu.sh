#!/bin/sh
# Profiles the third launch of a kernel in a benchmark with Nsight Compute, in place, and writes the
# report as text, the command first.
# Usage: tools/ncu.sh FILE KERNEL BENCHMARK [ARGUMENT...]
# as in: tools/ncu.sh near.txt attention_kernel prefill_cuda --where mode=near keys=16384
set -eu
file=$1
kernel=$2
shift 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
results=$(mktemp)
trap 'rm -f "$results"' EXIT
{
  echo "tools/ncu.sh ${file##*/} $kernel $*"
  # The GPU's own clocks, as in the benchmarks. What the benchmark would go on with is not needed.
  ncu --clock-control none --section SpeedOfLight --section ComputeWorkloadAnalysis \
    --section MemoryWorkloadAnalysis --section SchedulerStats --section WarpStateStats \
    --section LaunchStats --apply-rules no --print-details all \
    --kernel-name "regex:$kernel" --launch-skip 2 --launch-count 1 --kill yes \
    "${PYTHON:-python3}" -m benchmarks "$@" --baselines none --output "$results" |
    grep -v -e '^==' -e 'Table Description' -e 'Warning: Data collection'
} >"$file"
grep -q 'Warp State Statistics' "$file" || {
  echo "no report of a kernel $kernel: see $file" >&2
  exit 1
}
