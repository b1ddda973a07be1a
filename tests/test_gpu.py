"""What only a GPU can show. Without one every test here is skipped, says so and counts as nothing: `make test-gpu`.

DRAEM_NB_TEST_DEVICE=cpu executes what a CPU can execute of it, to see that the tests themselves work
(31_gpu does it in its dry run)."""

import contextlib
import copy
import os
import re

import pytest
import torch

from draem_nb import detector as detectors
from draem_nb import training
from draem_nb.data import demo_category, load_category
from draem_nb.losses import draem_loss
from draem_nb.recipes import demo, official
from draem_nb.textures import load_textures
from draem_nb.training import Trainer, load_checkpoint, train

DEVICE = torch.device(os.environ.get('DRAEM_NB_TEST_DEVICE', 'cuda'))
CUDA = DEVICE.type == 'cuda'
pytestmark = pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason='PyTorch finds no CUDA GPU here')
needs_cuda = pytest.mark.skipif(not CUDA, reason='only a GPU can do this')
TINY = dict(size=64, antialias=True, base_width=8, base_channels=8, batch=4, steps=40, checkpoint_every=4,
            precision='float32')
# half of the distance from 1 to the next number
UNIT = dict(float32=2.**-24, tf32=2.**-11, bfloat16=2.**-8, float16=2.**-11)


@pytest.fixture(scope='module')
def category():
    return load_category(demo_category('brick').parent, 'brick', 64)


@pytest.fixture(scope='module')
def textures():
    return load_textures(size=64)


def trainer_on(device: torch.device, category, textures, recipe=official, **fields) -> Trainer:
    return Trainer(category.train, textures, recipe().replace(**TINY | fields), device)


@contextlib.contextmanager
def no_waiting():
    "An operation for which the host waits for the GPU is an error."
    if CUDA: torch.cuda.set_sync_debug_mode('error')
    try: yield
    finally:
        if CUDA: torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('fields', [dict(), dict(color='bgr'), dict(own_share=0.5, soft_share=0.5)],
                         ids=['official', 'bgr', 'own'])
def test_the_batches_are_those_of_a_cpu(category, textures, fields):
    here, there = (trainer_on(device, category, textures, **fields) for device in (torch.device('cpu'), DEVICE))
    with contextlib.closing(there):
        assert bool(there.ahead) == CUDA
        for step in range(6):
            expected, batch = here.host_batch(step), there.ahead(step) if there.ahead else there.host_batch(step)
            assert all(torch.equal(a, b.cpu()) for a, b in zip(vars(expected).values(), vars(batch).values()))


@pytest.mark.parametrize('recipe', [official, demo])
def test_a_step_waits_for_nothing(category, textures, recipe):
    "`demo` has side heads and Muon; the first steps choose kernels and fill caches."
    with contextlib.closing(trainer_on(DEVICE, category, textures, recipe)) as trainer:
        for _ in range(3): trainer.step()
        with no_waiting():
            for _ in range(5): trainer.step()
        assert len(trainer.recent_losses(8)) == 3


@pytest.mark.parametrize('precision', UNIT)
def test_losses_against_float64(category, textures, precision):
    "The same weights and batch: float64 on a CPU, every precision on the GPU."
    exact = trainer_on(torch.device('cpu'), category, textures, size=64)
    batch, net = exact.host_batch(0), copy.deepcopy(exact.net).double()
    target, augmented, mask = (t.double() for t in (batch.target, batch.augmented, batch.mask))
    expected = torch.stack(draem_loss(*net(augmented), target, mask, exact.recipe))
    recipe = dict(precision='float32' if precision == 'tf32' else precision)
    with contextlib.closing(trainer_on(DEVICE, category, textures, **recipe)) as trainer, \
         torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=precision == 'tf32'):
        trainer.step()
        found = trainer.history[0].double().cpu()
    off = ((found - expected[1:]) / expected[1:]).abs().max().item()
    print(f'{precision}: off by {off:.1e}, {off / UNIT[precision]:.1f} units')
    assert off < 32 * UNIT[precision]


def losses_and_weights(run_dir) -> tuple[torch.Tensor, torch.Tensor]:
    state = load_checkpoint(run_dir / 'checkpoint.pt')
    return state['history'], torch.cat([p.flatten().float() for p in state['net'].values()])


def test_resume_on_the_gpu_and_on_a_cpu(category, textures, tmp_path, monkeypatch):
    """The order of sums differs between two runs on a GPU, so their bits may; the losses agree.

    A run moves between devices."""
    recipe = official().replace(**TINY | dict(steps=8))

    class Stopped(Trainer):
        def step(self):
            if self.done == 4: raise RuntimeError('the power is gone')
            super().step()
    train(category, textures, recipe, tmp_path / 'whole', DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(training, 'Trainer', Stopped)
        for name in ('gpu', 'cpu'):
            with pytest.raises(RuntimeError, match='the power is gone'):
                train(category, textures, recipe, tmp_path / name, DEVICE)
    for name, device in (('gpu', DEVICE), ('cpu', 'cpu')):
        train(category, textures, recipe, tmp_path / name, device)
        for found, whole in zip(losses_and_weights(tmp_path / name), losses_and_weights(tmp_path / 'whole')):
            assert (found - whole).norm() < 1e-2 * whole.norm()


@needs_cuda
def test_a_batch_that_is_too_large_is_a_sentence_and_its_advice_helps(category, textures, tmp_path):
    "The advice is followed until the run goes on, as a user would."
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1., (torch.cuda.memory_reserved(DEVICE) + 3 * 2**30) / total))
    recipe = official().replace(**TINY | dict(base_width=128, base_channels=64, batch=256, steps=1))
    try:
        for attempt in range(9):
            try: train(category, textures, recipe, tmp_path / str(attempt), DEVICE); break
            except ValueError as error:
                assert f'batch is {recipe.batch}' in str(error)
                recipe = recipe.replace(batch=int(re.search(r'try batch=(\d+)', str(error))[1]))
        assert 0 < attempt and (tmp_path / str(attempt) / 'checkpoint.pt').exists()
    finally: torch.cuda.set_per_process_memory_fraction(1.)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='there are not two GPUs')
def test_two_gpus_are_told_apart_by_index(category, textures, tmp_path):
    for index in (0, 1):
        torch.cuda.empty_cache()
        before = [torch.cuda.memory_allocated(i) for i in (0, 1)]
        with contextlib.closing(trainer_on(torch.device('cuda', index), category, textures)) as trainer:
            trainer.step()
            grown = [torch.cuda.memory_allocated(i) - b for i, b in zip((0, 1), before)]
            assert grown[index] > 0 and grown[1 - index] == 0
        del trainer


@pytest.mark.parametrize('allow_tf32, tolerance', [(False, 1e-3), (True, 2e-2)], ids=['float32', 'as it comes'])
def test_predict_gives_what_a_cpu_gives(category, textures, tmp_path, allow_tf32, tolerance):
    "A short run, so that maps are not all alike. A verdict may differ only within the tolerance of the threshold."
    detectors.fit(category, demo().replace(**TINY), 'cpu', textures, tmp_path)
    cpu, gpu = (detectors.Detector.load(tmp_path, device) for device in ('cpu', DEVICE))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allow_tf32):
        expected, found = cpu.predict(category.test), gpu.predict(category.test)
    off = (expected.maps - found.maps).abs().max().item()
    print(f'maps differ by at most {off:.1e}, scores by {(expected.scores - found.scores).abs().max().item():.1e}')
    assert off < tolerance
    sure = (expected.scores - cpu.threshold).abs() > tolerance
    assert torch.equal(expected.is_anomalous[sure], found.is_anomalous[sure])


@needs_cuda
def test_a_compiled_step_is_the_same_step(category, textures):
    """Ten steps of `demo`, each from the same weights: the first two compile and record CUDA graphs, the others replay
    them. Three more wait for nothing."""
    plain, compiled = (trainer_on(DEVICE, category, textures, demo, compile=compile) for compile in (False, True))
    with contextlib.closing(plain), contextlib.closing(compiled), torch.backends.cudnn.flags(enabled=True,
                                                                                             allow_tf32=False):
        for _ in range(10):
            compiled.load_state_dict(plain.state_dict())
            for trainer in (plain, compiled): trainer.step()
        with no_waiting():
            for _ in range(3): compiled.step()
    assert torch.allclose(plain.history[:10], compiled.history[:10], rtol=1e-4, atol=0)
