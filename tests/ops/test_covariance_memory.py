"""What a covariance takes beside its input and result is small, whatever the input's type and layout."""

import json
import os
import subprocess
import sys

import pytest

from bench import memory

MEASURE = """
import json, torch, kfac_ext
from bench.memory import peak_extra
torch.set_num_threads(1)

def image(dtype, layout=torch.contiguous_format):
    return torch.randn(24, 64, 56, 56).to(dtype).contiguous(memory_format=layout)

calls = {
    "3x3": lambda x: kfac_ext.conv2d_covariance(x, 3, padding=1),
    "3x3 /2": lambda x: kfac_ext.conv2d_covariance(x, 3, stride=2, padding=1),
    "reduce": lambda x: kfac_ext.conv2d_covariance(x, 3, padding=1, mode="reduce"),
    "gradient": kfac_ext.gradient_covariance,
    "summed gradient": lambda x: kfac_ext.gradient_covariance(x, mode="reduce"),
    "rows": lambda x: kfac_ext.linear_covariance(x.view(len(x), -1, 64)),
}
inputs = {"bf16": image(torch.bfloat16), "fp16": image(torch.float16)}
inputs |= {"channels last": image(torch.bfloat16, torch.channels_last), "float32": image(torch.float32)}
peaks = {}
for name, call in calls.items():
    for kind, x in inputs.items():
        if name == "rows" and kind == "channels last":
            continue
        call(x[:2])
        peaks[f"{name}, {kind}"] = peak_extra(lambda: call(x))
print(json.dumps(peaks))
"""
COPY = 4 * 24 * 64 * 56 * 56  # bytes of the input as float32


@pytest.mark.skipif(memory.supported() is not None, reason="needs Linux's /proc/self/clear_refs")
def test_no_copy_of_the_input():
    environment = {**os.environ, **memory.ENVIRONMENT}
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, env=environment)
    peaks = json.loads(run.stdout)
    assert len(peaks) == 23
    assert {name: peak for name, peak in peaks.items() if peak > COPY / 5} == {}
