#!/bin/sh
# Runs the GPU tests' small cases under compute-sanitizer.
set -u
PYTHON=${PYTHON:-python3}
case_script='
import torch
from rtpurbo import ops
torch.manual_seed(0)
for n in (1, 513, 2049):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scores = (torch.randn(3, n) * 3).to(dtype).cuda()
        ops.top_p(scores, 0.9, 4, torch.zeros(3, device="cuda"))
torch.cuda.synchronize()
'
status=0
for tool in memcheck racecheck initcheck synccheck; do
  if compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -c "$case_script"; then
    echo "$tool: clean"
  else
    echo "$tool: errors found"
    status=1
  fi
done
exit $status
