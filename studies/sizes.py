"""Time and memory of one whole image over its size: how the cost grows, one fresh process per size.

python studies/sizes.py --method sc-clip --arch ViT-B-16 --mode whole
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys

SIZES = (336, 448, 672, 1024)
CODE = """
import json, resource, statistics, sys, time, torch
from ovbench.models.build import build_model
method, arch, mode, dtype, short, words, repeats = sys.argv[1:8]
model = build_model(method, classes=[f"class {i}" for i in range(int(words))], weights="random", arch=arch, mode=mode,
                    dtype=dtype, protocol="common", templates="plain")
h, w = int(short), int(short) * 4 // 3
image = torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
open("/proc/self/clear_refs", "w").write("5")
times = []
for _ in range(int(repeats) + 1):
    start = time.perf_counter()
    model.predict_labels([image], [(h, w)])
    times.append(time.perf_counter() - start)
peak = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")][0] * 1024
print(json.dumps({"size": [h, w], "seconds": statistics.median(times[1:]), "extra_mib": (peak - before) / 2**20}))
"""


def main() -> None:
    """Measures every size and prints the growth from one to the next as an exponent of the pixel count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="sc-clip")
    parser.add_argument("--arch", default="ViT-B-16")
    parser.add_argument("--mode", default="whole", choices=["whole", "slide"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--words", default="150")
    parser.add_argument("--repeats", default="3")
    a = parser.parse_args()
    print(f"{a.method}, {a.arch}, {a.mode}, {a.dtype}, {a.words} words")
    print(f"{'input':>10} {'seconds':>8} {'extra MiB':>9}   growth per pixel: time, memory")
    last = None
    for short in SIZES:
        command = [sys.executable, "-c", CODE, a.method, a.arch, a.mode, a.dtype, str(short), a.words, a.repeats]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        line = f"{found['size'][0]:5d}x{found['size'][1]:<4d} {found['seconds']:8.2f} {found['extra_mib']:9.0f}"
        if last:
            pixels = math.log(math.prod(found["size"]) / math.prod(last["size"]))
            line += f"   pixels^{math.log(found['seconds'] / last['seconds']) / pixels:.2f}"
            line += f", pixels^{math.log(found['extra_mib'] / last['extra_mib']) / pixels:.2f}"
        print(line, flush=True)
        last = found


if __name__ == "__main__":
    main()
