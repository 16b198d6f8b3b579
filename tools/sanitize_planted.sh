#!/bin/sh
# Whether each of compute-sanitizer's tools, as sanitize.sh runs it, reports a planted fault.
# Usage: tools/sanitize_planted.sh [LOG_FOLDER]
set -u
logs=${1:-build/sanitizer-logs}
mkdir -p "$logs"
for tool in memcheck racecheck initcheck synccheck; do
  sh tools/sanitize_one.sh "$tool" "$logs/$tool-planted.log" tools/sanitize_planted.py "$tool" &
done
wait
status=0
check() { # TOOL REPORT
  log="$logs/$1-planted.log"
  if grep -q "$2" "$log" && [ "$(tail -1 "$log")" != "exit status 0" ]; then
    echo "$1 reports its fault: $(grep -m 1 "$2" "$log")"
  else
    echo "$1 is blind to its fault: $log"
    status=1
  fi
}
check memcheck "Invalid __global__ read"
check racecheck "Race reported between"
check initcheck "Uninitialized __global__ memory read"
check synccheck "Barrier error detected"
exit $status
