#!/bin/sh
# Runs a small case of every CUDA operator under compute-sanitizer's four tools, and those of the
# portable kernels where Hopper has others, at once, in place.
# Usage: tools/sanitize.sh [LOG_FOLDER]
set -u
logs=${1:-build/sanitizer-logs}
mkdir -p "$logs"
for tool in memcheck racecheck initcheck synccheck; do
  sh tools/sanitize_one.sh "$tool" "$logs/$tool.log" tools/sanitize_cases.py &
  RTPURBO_PORTABLE=1 sh tools/sanitize_one.sh "$tool" "$logs/$tool-portable.log" \
    tools/sanitize_cases.py &
done
wait
status=0
for tool in memcheck racecheck initcheck synccheck; do
  for log in "$logs/$tool.log" "$logs/$tool-portable.log"; do
    printf '%s: %s\n' "$(basename "$log" .log)" "$(tail -2 "$log" | tr '\n' ' ')"
    [ "$(tail -1 "$log")" = "exit status 0" ] || status=1
  done
done
exit $status
