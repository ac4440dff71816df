"""verl 0.9's rollout correction (token-level TIS and its metrics) on the tensors of a file. Prints one line of JSON.

    python verl_correction.py FILE RUNS        FILE: torch.save of old, rollout, mask

verl's pipeline carries an int64 mask, so that is what is timed; float32, the fastest it takes, is timed as well.
"""

import json
import statistics
import sys
import time

import torch
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

torch.set_num_threads(1)
data = torch.load(sys.argv[1])
seconds = {}
for name, mask in (("int64", data["mask"].long()), ("float32", data["mask"].float())):
    times = []
    for _ in range(int(sys.argv[2]) + 1):
        start = time.perf_counter()
        weights, _, metrics = compute_rollout_correction_and_rejection_mask(
            data["old"], data["rollout"], mask, rollout_is="token", rollout_is_threshold=2.0
        )
        times.append(time.perf_counter() - start)
    seconds[name] = statistics.median(times[1:])
metrics["weights_sum"] = weights.batch["rollout_is_weights"].double().sum().item()
print(json.dumps({"seconds": seconds, "metrics": metrics}))
