"The networks, on processors other than this one as well."
import os
import subprocess
import sys

NARROW = '''
import torch
from draem_nb.cutpaste import ResNet18
torch.set_num_threads(1)
for width in (2, 4, 6, 7):
    net = ResNet18(width).to(memory_format=torch.channels_last)
    for _ in range(30): net(torch.rand(6, 3, 32, 32).contiguous(memory_format=torch.channels_last)).sum().backward()
'''

def test_narrow_resnets_train_without_avx512():
    "As on a processor with AVX2 alone: there oneDNN's strided 1 x 1 convolution of fewer than 8 channels corrupts the heap."
    environment = os.environ | dict(ONEDNN_MAX_CPU_ISA='AVX2', ATEN_CPU_CAPABILITY='avx2')
    done = subprocess.run([sys.executable, '-c', NARROW], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
