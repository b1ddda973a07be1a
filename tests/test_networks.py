"The networks, on processors other than this one as well."
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from draem_nb.networks import BatchNorm2d, Draem, initialise

NARROW = '''
import torch
from draem_nb.cutpaste import ResNet18
torch.set_num_threads(1)
for width in (2, 4, 6, 7):
    net = ResNet18(width).to(memory_format=torch.channels_last)
    for _ in range(30): net(torch.rand(6, 3, 32, 32).contiguous(memory_format=torch.channels_last)).sum().backward()
'''

def test_narrow_resnets_train_without_avx512():
    """As on a processor with AVX2 alone: there oneDNN's strided 1 x 1 convolution of fewer than 8
    channels corrupts the heap."""
    environment = os.environ | dict(ONEDNN_MAX_CPU_ISA='AVX2', ATEN_CPU_CAPABILITY='avx2')
    done = subprocess.run([sys.executable, '-c', NARROW], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('channels', [8, 16, 24])
def test_batch_norm_is_pytorchs_but_exact(channels):
    """Output, gradients and running statistics beside PyTorch's in float64; in channels-last 16 channels
    take statistics of their own."""
    g = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(4, channels, 96, 96, generator=g).add(3).contiguous(memory_format=torch.channels_last)
                   for _ in range(2))
    ours, exact = BatchNorm2d(channels), nn.BatchNorm2d(channels).double()
    found = []
    for bn, dtype in ((ours, torch.float32), (exact, torch.float64)):
        inputs = x.to(dtype).requires_grad_()
        y = bn(inputs)
        gradients = torch.autograd.grad((y * upstream.to(dtype)).sum(), (inputs, bn.weight, bn.bias))
        found.append([y.detach(), gradients[0], *(v / len(x) / 96**2 for v in gradients[1:]), bn.running_mean,
                      bn.running_var])
    for a, b in zip(*found): assert (a - b).abs().max() < 5e-5      # PyTorch's kernel: 3e-4
    assert ours.num_batches_tracked == 1 and y.is_contiguous(memory_format=torch.channels_last)
    for bn in (ours, exact): bn.eval()
    assert (ours(x) - exact(x.double())).abs().max() < 1e-5


def test_initial_weights():
    "Of the asked size, from the generator's seed alone; the last bias at the prior."
    make = lambda seed, **k: initialise(Draem(8, 8), torch.Generator().manual_seed(seed), **k)
    kernels = lambda net: torch.cat([m.weight.detach().flatten() for m in net.modules() if isinstance(m, nn.Conv2d)])
    assert torch.equal(kernels(make(1)), kernels(make(1))) and not torch.equal(kernels(make(1)), kernels(make(2)))
    assert abs(kernels(make(1)).std() - 0.02) < 5e-4 and abs(kernels(make(1, std=0.05)).std() - 0.05) < 1e-3
    scales = torch.cat([m.weight.detach() for m in make(1).modules() if isinstance(m, nn.BatchNorm2d)])
    assert abs(scales.mean() - 1) < 5e-3 and abs(scales.std() - 0.02) < 3e-3
    assert (make(1, anomaly_prior=0.2).discriminative.decoder_segment.fin_out[0].bias.softmax(0)[1].item()
            == pytest.approx(0.2))
