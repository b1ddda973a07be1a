"""What a notebook cell cannot show: runs that are killed, bad folders, and the same bits after all of it."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from draem_nb import training
from draem_nb.data import load_category
from draem_nb.detector import Detector
from draem_nb.networks import Draem
from draem_nb.recipes import demo, official
from draem_nb.supervision import SideHeads
from draem_nb.textures import load_textures
from draem_nb.training import BatchesAhead, Trainer, load_checkpoint, split_held_out, train

CLASS = 'brick'        # in `root`
TINY = dict(size=64, base_width=4, base_channels=4, steps=600, batch=2, checkpoint_every=5, precision='float32')

# Reads a run folder a line and trains there, in a child of its own: what is imported and read is so only once.
# Its lines: the child's process id, and how the child ended.
TRAIN = """
import json, os, sys
import torch
from draem_nb.data import load_category
from draem_nb.recipes import demo
from draem_nb.textures import load_textures
from draem_nb.training import Trainer, train
root, recipe = sys.argv[1:]
recipe = demo().replace(**json.loads(recipe))
category, textures = load_category(root, 'brick', recipe.size), load_textures(size=recipe.size)
Trainer(category.train, textures, recipe, torch.device('cpu')).host_batch(0)      # compiled
for line in iter(sys.stdin.readline, ''):
    child, status = os.fork(), 1
    if not child:
        try: train(category, textures, recipe, line.strip(), 'cpu'); status = 0
        finally: os._exit(status)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope='module')
def category(root):
    return load_category(root, 'brick', 64)


@pytest.fixture(scope='module')
def textures():
    return load_textures(size=64)


class Trainings:
    "Starts trainings one after another, each a process."
    def __init__(self, root: Path) -> None:
        recipe = json.dumps(TINY | dict(steps=150, checkpoint_every=3))
        self.process = subprocess.Popen([sys.executable, '-c', TRAIN, str(root), recipe], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                        env={**os.environ, 'OMP_NUM_THREADS': '1'})

    def start(self, run_dir: Path) -> int:
        print(run_dir, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self) -> int: return int(self.process.stdout.readline())


def weights(run_dir: Path) -> torch.Tensor:
    return torch.cat([p.flatten().double() for p in load_checkpoint(run_dir / 'checkpoint.pt')['net'].values()])


def test_killed_at_ten_random_moments_ends_with_the_same_bits(root, tmp_path):
    trainings = Trainings(root)
    trainings.start(tmp_path / 'whole')
    assert trainings.wait() == 0
    killed, rng = tmp_path / 'killed', random.Random(0)
    # written at every start
    started = lambda: (killed / 'run.json').stat().st_mtime_ns if (killed / 'run.json').exists() else 0
    for kill in range(10):
        before, child = started(), trainings.start(killed)
        runs = Path(f'/proc/{child}').exists
        while runs() and started() == before: time.sleep(0.01)
        if kill == 3:       # this one while a checkpoint is being written
            while runs() and not list(killed.glob('.checkpoint.pt.*')): pass
        else: time.sleep(rng.uniform(0, 0.3))
        assert runs(), 'the run ended before it could be killed: give it more steps'
        os.kill(child, signal.SIGKILL)
        assert trainings.wait() == signal.SIGKILL
        if (killed / 'checkpoint.pt').exists(): load_checkpoint(killed / 'checkpoint.pt')      # never half of one
    trainings.start(killed)
    assert trainings.wait() == 0
    trainings.process.communicate()
    assert torch.equal(weights(tmp_path / 'whole'), weights(killed))
    assert (tmp_path / 'whole' / 'losses.csv').read_bytes() == (killed / 'losses.csv').read_bytes()


def test_same_seed_same_bits_in_the_processors_fast_precision(category, textures, tmp_path):
    recipe = demo().replace(**{**TINY, 'precision': 'auto', 'steps': 10})
    for name in 'ab': train(category, textures, recipe, tmp_path / name, 'cpu')
    assert torch.equal(weights(tmp_path / 'a'), weights(tmp_path / 'b'))
    train(category, textures, recipe.replace(seed=1), tmp_path / 'c', 'cpu')
    assert not torch.equal(weights(tmp_path / 'a'), weights(tmp_path / 'c'))


def test_a_clock_that_goes_back_changes_nothing(category, textures, tmp_path, monkeypatch):
    recipe = demo().replace(**{**TINY, 'steps': 6})
    train(category, textures, recipe, tmp_path / 'a', 'cpu')
    now = itertools.count(2e9, -3600.)
    monkeypatch.setattr(time, 'time', lambda: next(now))
    with pytest.raises(KeyboardInterrupt):          # stopped and resumed, each file older than the one before it
        train(category, textures, recipe, tmp_path / 'b', 'cpu', on_step=lambda *_: signal.raise_signal(signal.SIGINT))
    for age, path in enumerate((tmp_path / 'b').iterdir()): os.utime(path, (4e9 - age, 4e9 - age))
    train(category, textures, recipe, tmp_path / 'b', 'cpu')
    assert torch.equal(weights(tmp_path / 'a'), weights(tmp_path / 'b'))


def test_bgr_is_rgb_with_every_channel_turned_round(category, textures, tmp_path):
    "Images come in as RGB everywhere; a BGR run trains and predicts as an RGB run does on turned images and textures."
    tint = torch.tensor([1., .8, .5])[:, None, None]
    category = dataclasses.replace(category, train=(category.train * tint).to(torch.uint8),
                                   test=(category.test * tint).to(torch.uint8))
    turned = dataclasses.replace(category, train=category.train.flip(1), test=category.test.flip(1))
    recipe = demo().replace(**{**TINY, 'steps': 6, 'augmentation': 'none'})          # augmentation knows what is red
    bgr = Detector.load(train(category, textures, recipe.replace(color='bgr'), tmp_path / 'bgr', 'cpu'), 'cpu')
    rgb = Detector.load(train(turned, textures.flip(1), recipe, tmp_path / 'rgb', 'cpu'), 'cpu')
    assert (not torch.equal(category.test, turned.test)
            and torch.equal(weights(tmp_path / 'bgr'), weights(tmp_path / 'rgb')))
    a, b = bgr.predict(category.test, reconstructions=True), rgb.predict(turned.test, reconstructions=True)
    assert torch.equal(a.maps, b.maps) and torch.equal(a.reconstructions, b.reconstructions.flip(1))


def test_compiled_steps_are_one_graph_and_the_same_steps(category, textures, monkeypatch):
    """Without a code generator, which would take minutes: what is captured and differentiated is the whole net, once,
    and ten steps, each from the same weights, give the losses that they give uncompiled."""
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='aot_eager', fullgraph=True))
    plain, compiled = (Trainer(category.train, textures, demo().replace(**TINY, compile=compile), torch.device('cpu'))
                       for compile in (False, True))
    assert compiled.forward is not compiled.net
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(10):
            compiled.load_state_dict(plain.state_dict())
            for trainer in (plain, compiled): trainer.step()
    assert torch.allclose(compiled.history[:10], plain.history[:10], rtol=1e-4, atol=0)
    gradients = [torch.cat([p.grad.flatten() for p in trainer.net.parameters()]) for trainer in (plain, compiled)]
    # rounding; another step is off by as much as itself
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()


def test_a_gpu_records_compiled_passes_and_every_step_says_where_it_begins(category, textures, monkeypatch):
    """What CUDA graphs need and a CPU can show: the mode that records; a mark before each pass, when the gradients of
    the last one, whose memory the next overwrites, are gone; losses that are no output of the recording."""
    happened = []

    def compile(net, mode):
        def forward(x):
            happened.append('pass' if all(p.grad is None for p in net.parameters()) else 'pass over old gradients')
            return net(x)
        happened.append(mode)
        return forward

    monkeypatch.setattr(torch, 'compile', compile)
    monkeypatch.setattr(torch.compiler, 'cudagraph_mark_step_begin', lambda: happened.append('step begins'))
    training.compiled_forward(Draem(2, 2), torch.device('cuda'))
    for recipe in (demo().replace(**TINY), demo().replace(**TINY, compile=True)):
        trainer = Trainer(category.train, textures, recipe, torch.device('cpu'))
        for _ in range(2): trainer.step()
    assert happened == ['reduce-overhead', 'default', *['step begins', 'pass'] * 2]
    assert not trainer.history.requires_grad


def test_initial_weights_are_the_recipes(category, textures):
    for std in (0.02, 0.057):
        net = Trainer(category.train, textures, demo().replace(**TINY, init_std=std, kernel_lr=None),
                      torch.device('cpu')).net
        weights = torch.cat([m.weight.flatten() for m in net.modules() if isinstance(m, torch.nn.Conv2d)])
        assert abs(weights.std() / std - 1) < 0.05


def test_resume_false_starts_anew(category, textures, tmp_path):
    recipe = demo().replace(**{**TINY, 'steps': 4})
    train(category, textures, recipe, tmp_path, 'cpu')
    (tmp_path / 'metrics.json').write_text('{}')
    train(category, textures, recipe.replace(lr=1e-2), tmp_path, 'cpu', resume=False)
    assert json.loads((tmp_path / 'run.json').read_text())['recipe']['lr'] == 1e-2
    assert not (tmp_path / 'metrics.json').exists()


def test_another_recipe_in_the_folder_is_refused_and_nothing_is_changed(category, textures, tmp_path):
    recipe = demo().replace(**{**TINY, 'steps': 4})
    train(category, textures, recipe, tmp_path, 'cpu')
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r'another recipe or data \(batch 2 there, 3 now\); choose another run_dir'):
        train(category, textures, recipe.replace(batch=3), tmp_path, 'cpu')
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize('where', ['file', 'file/below'])
def test_run_folder_that_cannot_be_made(category, textures, tmp_path, where):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='cannot be made'):
        train(category, textures, demo().replace(**TINY), tmp_path / where, 'cpu')


def test_a_gpu_that_is_too_small_is_a_sentence(category, textures, tmp_path, monkeypatch):
    def step(self): raise torch.cuda.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(Trainer, 'step', step)
    for batch, remedy in ((6, 'try batch=3'), (1, 'try a smaller size or base_width')):
        with pytest.raises(ValueError, match=f'field batch is {batch}: the memory of the GPU is too small for '
                           f'that; {remedy}'):
            train(category, textures, demo().replace(**{**TINY, 'batch': batch}), tmp_path / str(batch), 'cpu')


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_a_gpu_that_is_not_there_leaves_no_run(category, textures, tmp_path):
    with pytest.raises(ValueError, match="use device='cpu'"):
        train(category, textures, demo().replace(**TINY), tmp_path / 'run', 'cuda')
    assert not (tmp_path / 'run').exists()


def test_one_image_is_not_enough(category, textures, tmp_path):
    alone = dataclasses.replace(category, train=category.train[:1], train_paths=category.train_paths[:1])
    with pytest.raises(ValueError, match='at least 2 are needed'):
        train(alone, textures, demo().replace(**TINY), tmp_path / 'run', 'cpu')
    assert not (tmp_path / 'run').exists()


def test_damaged_checkpoint_is_named(category, textures, tmp_path):
    recipe = demo().replace(**{**TINY, 'steps': 4})
    checkpoint = train(category, textures, recipe, tmp_path, 'cpu')
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    with pytest.raises(ValueError, match='checkpoint.pt is not a readable checkpoint'):
        train(category, textures, recipe, tmp_path, 'cpu')


@pytest.mark.parametrize('fields', [dict(reconstructive=False), dict(discriminative=False),
                                    dict(discriminative=False, reconstruction_map='msgms'),
                                    dict(mask_shape='rectangle'), dict(texture_source='color'),
                                    dict(augmentation='none'), dict(opacity=(1, 1)),
                                    dict(n_textures=3), dict(size=(64, 96)),
                                    dict(augmentation='paper', replacement=False), dict(holdout=0.)])
def test_every_ablation_trains_and_predicts(root, tmp_path, fields):
    recipe = demo().replace(**{**TINY, 'steps': 3, **fields})
    category = load_category(root, 'brick', recipe.size)
    checkpoint = train(category, load_textures(size=recipe.size), recipe, tmp_path, 'cpu')
    detector = Detector.load(checkpoint, 'cpu')
    _, held_out = split_held_out(len(category.train), recipe)
    if len(held_out): detector.calibrate(category.train[held_out])
    found = detector.predict(category.test[:3])
    assert found.maps.shape == (3, *category.size) and found.maps.isfinite().all()
    assert (found.is_anomalous is None) == (recipe.holdout == 0)


def test_losses_csv_has_the_learning_rates_that_the_optimiser_used(category, textures, tmp_path):
    """The schedule's, falling after its milestones; the optimiser's own where somebody changed
    it; the same after a resume."""
    recipe = demo().replace(**{**TINY, 'steps': 10, 'lr': 1e-3, 'schedule': 'milestones', 'lr_milestones': (0.5, 0.8),
                               'lr_decay': 0.5})
    train(category, textures, recipe, tmp_path, 'cpu')
    lines = (tmp_path / 'losses.csv').read_text().splitlines()
    assert [float(line.split(',')[-1]) for line in lines[1:]] == pytest.approx([1e-3] * 5 + [5e-4] * 3 + [2.5e-4] * 2,
                                                                               rel=1e-12)
    state = load_checkpoint(tmp_path / 'checkpoint.pt')
    trainer = Trainer(category.train, textures, recipe.replace(steps=12), torch.device('cpu'))
    trainer.load_state_dict(state)
    trainer.optimizers[0].param_groups[0]['lr'] = 0.125
    trainer.step()
    assert trainer.rates[:10].tolist() == state['rates'].tolist() and trainer.rates[10] == 0.125


def test_the_linear_schedule_reaches_every_optimiser(category, textures):
    trainer = Trainer(category.train, textures, demo().replace(**{**TINY, 'steps': 4}), torch.device('cpu'))
    for step in range(4):
        assert [group['lr'] for o in trainer.optimizers for group in o.param_groups] == [3e-3 * (1 - step / 4),
                                                                                         0.05 * (1 - step / 4)]
        trainer.step()


def test_training_aids_leave_no_trace_in_the_finished_checkpoint(category, textures):
    trainer, released = (Trainer(category.train, textures, demo().replace(**{**TINY, 'steps': 3}), torch.device('cpu')),
                         set(Draem(4, 4).state_dict()))
    trainer.step()
    assert ({'heads', 'optimizers', 'schedulers'} <= set(trainer.state_dict())
            and set(trainer.state_dict()['net']) == released)
    while trainer.done < 3: trainer.step()
    assert (not {'heads', 'optimizers', 'schedulers'} & set(trainer.state_dict())
            and set(trainer.state_dict()['net']) == released)


def test_side_heads_hear_the_clean_image_and_fade(category, textures, monkeypatch):
    seen, weights = [], []
    monkeypatch.setattr(SideHeads, 'loss', lambda self, target: seen.append(target.clone())
                        or sum(h.weight.sum() for h in self.heads))
    trainer = Trainer(category.train, textures, demo().replace(**{**TINY, 'steps': 10}), torch.device('cpu'))
    for _ in range(10):
        before = [h.weight.clone() for h in trainer.heads.heads]
        trainer.step()
        weights.append(any(not torch.equal(b, h.weight) for b, h in zip(before, trainer.heads.heads)))
        if len(seen) == trainer.done: assert torch.equal(seen[-1], trainer.batch.target)
    assert len(seen) == 9 and trainer.net.state_dict().keys() == Draem(4, 4).state_dict().keys()


def test_without_a_reconstructive_net_there_are_no_heads(category, textures):
    trainer = Trainer(category.train, textures, demo().replace(**TINY, reconstructive=False), torch.device('cpu'))
    trainer.step()
    assert trainer.heads is None


def small(**fields):
    "A trainer on ten random images of 32 px."
    drawn = lambda seed: torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8,
                                       generator=torch.Generator().manual_seed(seed))
    return Trainer(drawn(0), drawn(1), official().replace(size=32, base_width=2, base_channels=2, batch=2,
                                                          precision='float32', **fields), torch.device('cpu'))


def test_the_published_optimiser():
    """Adam at 1e-4 without weight decay, betas and epsilon as PyTorch has them, one group of all weights;
    times 0.2 at 80 % and 90 %."""
    trainer = small(epochs=10)
    optimizer, = trainer.optimizers
    group, = optimizer.param_groups
    assert type(optimizer) is torch.optim.Adam and (group['lr'], group['betas'], group['eps'], group['weight_decay'],
                                                    group['amsgrad']) == (1e-4, (0.9, 0.999), 1e-8, 0, False)
    assert len(group['params']) == len(list(trainer.net.parameters()))
    while trainer.done < trainer.total: trainer.step()
    assert trainer.total == 50 and trainer.rates.tolist() == pytest.approx([1e-4] * 40 + [2e-5] * 5 + [4e-6] * 5)


def test_every_random_choice_follows_the_seed():
    "Initial weights, which images are held out, and the batches."
    a, again, other = small(seed=1), small(seed=1), small(seed=2)
    weights = lambda trainer: torch.cat([p.detach().flatten() for p in trainer.net.parameters()])
    assert torch.equal(weights(a), weights(again)) and not torch.equal(weights(a), weights(other))
    held_out = [split_held_out(100, trainer.recipe)[1].tolist() for trainer in (a, again, other)]
    assert held_out[0] == held_out[1] != held_out[2]
    for trainer in (a, again, other): trainer.step()
    assert torch.equal(a.batch.augmented, again.batch.augmented) and not torch.equal(a.batch.target, other.batch.target)
    first = a.batch.target.clone(); a.step()
    assert not torch.equal(a.batch.target, first)


def test_channel_order_of_what_is_trained_on():
    rgb, bgr = small(), small(color='bgr')
    assert (torch.equal(rgb.images, bgr.images.flip(1))
            and torch.equal(rgb.simulator.textures, bgr.simulator.textures.flip(1)))


def test_a_snapshot_has_the_weights_after_its_step(category, textures, tmp_path):
    recipe = demo().replace(**{**TINY, 'steps': 5})
    train(category, textures, recipe, tmp_path, 'cpu', snapshots=[3])
    fit, _ = split_held_out(len(category.train), recipe)
    trainer = Trainer(category.train[fit], textures, recipe, torch.device('cpu'))
    while trainer.done < 3: trainer.step()
    kept = load_checkpoint(tmp_path / 'checkpoint-3.pt')
    assert kept['step'] == 3 and all(torch.equal(v, kept['net'][k]) for k, v in trainer.net.state_dict().items())


def test_a_step_with_side_heads_in_half_precision(category, textures):
    "The networks run in bfloat16 under autocast, the side heads outside it."
    trainer = Trainer(category.train, textures,
                      demo().replace(**TINY | dict(precision='bfloat16', deep_supervision=1.)), torch.device('cpu'))
    trainer.step()
    assert trainer.history[0].isfinite().all()


class Ahead(Trainer):
    "Makes batches ahead on a CPU too, where nothing is gained by it."
    def __init__(self, *args):
        super().__init__(*args)
        self.ahead = BatchesAhead(self.host_batch, self.device, self.total)


class StoppedAt(Ahead):
    at = 0

    def step(self):
        super().step()
        if self.done == self.at: signal.raise_signal(signal.SIGINT)


def threads_ahead() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith('batches ahead')]


def test_batches_made_ahead_are_the_same_wherever_a_run_is_stopped(category, textures, tmp_path, monkeypatch):
    recipe = demo().replace(**{**TINY, 'steps': 6})
    train(category, textures, recipe, tmp_path / 'plain', 'cpu')
    for at in (1, 4):
        monkeypatch.setattr(training, 'Trainer', type('Stopped', (StoppedAt,), dict(at=at)))
        with pytest.raises(KeyboardInterrupt, match=f'stopped at step {at} of 6'):
            train(category, textures, recipe, tmp_path / str(at), 'cpu')
        assert not threads_ahead()
        train(category, textures, recipe, tmp_path / str(at), 'cpu')
        assert torch.equal(weights(tmp_path / 'plain'), weights(tmp_path / str(at))) and not threads_ahead()


def test_crops_made_ahead_are_the_same(root, tmp_path, monkeypatch):
    recipe, category = (demo().replace(**{**TINY, 'steps': 4, 'image_size': (96, 128)}),
                        load_category(root, 'brick', (96, 128)))
    textures = load_textures(size=64)
    train(category, textures, recipe, tmp_path / 'plain', 'cpu')
    monkeypatch.setattr(training, 'Trainer', Ahead)
    train(category, textures, recipe, tmp_path / 'ahead', 'cpu')
    assert torch.equal(weights(tmp_path / 'plain'), weights(tmp_path / 'ahead'))


def test_an_error_while_a_batch_is_made_ahead_is_raised_as_itself(category, textures, tmp_path, monkeypatch):
    class Failing(Ahead):
        def host_batch(self, step, out=None):
            if step == 3: raise OSError('the disk with the images is gone')
            return super().host_batch(step, out)
    monkeypatch.setattr(training, 'Trainer', Failing)
    with pytest.raises(OSError, match='the disk with the images is gone'):
        train(category, textures, demo().replace(**{**TINY, 'steps': 6}), tmp_path, 'cpu')
    assert not threads_ahead()


def test_batches_are_made_in_time_and_no_more_than_there_are(category, textures):
    "Three ahead of the one that is asked for, none after the last; from any step on."
    made = []
    ahead = BatchesAhead(lambda step: (made.append(step), trainer.host_batch(step))[1], torch.device('cpu'), total=9)
    trainer = Trainer(category.train, textures, demo().replace(**TINY), torch.device('cpu'))
    for step, until in ((0, 3), (1, 4), (5, 8), (6, 8)):
        batch = ahead(step)
        for future in ahead.waiting.values(): future.result()
        assert made == [*range(until + 1)] and torch.equal(batch.augmented, trainer.host_batch(step).augmented)
    ahead.close()
    assert not threads_ahead()


def test_copies_run_on_a_stream_of_their_own_and_the_gpu_waits_for_them(monkeypatch):
    "A simulated GPU that notes what is asked of it; in the end the memory is known to both streams."
    asked, event = [], object()

    class Stream:
        def record_event(self): asked.append('event after the copy'); return event
        def wait_event(self, of): asked.append('wait for it'); assert of is event

    class Batch:
        def __init__(self): self.target = self
        def to(self, device): asked.append('copy'); return self
        def record_stream(self, stream): asked.append('keep until used'); assert stream is computing

    @contextlib.contextmanager
    def within(stream):
        asked.append('stream'); assert stream is ahead.stream is not computing
        yield
        asked.append('end of stream')
    computing = Stream()
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: Stream())
    monkeypatch.setattr(torch.cuda, 'stream', within)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: computing)
    ahead = BatchesAhead(lambda step: Batch(), torch.device('cuda'), total=1)
    ahead(0)
    ahead.close()
    assert asked == ['stream', 'copy', 'event after the copy', 'end of stream', 'wait for it', 'keep until used']
