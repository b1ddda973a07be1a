"""Planted faults: each row of FAULTS is put into a copy of the library, one at a time, and its
tests must fail. `make mutants`.

Prints a line a fault and ends with an error if one survives; names or parts of names as
arguments run those rows alone."""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# name: (module, text, other text, test file, which of its tests)
FAULTS = {
    'align_corners off': ('networks', 'align_corners=True', 'align_corners=False', 'test_golden', 'networks and eval'),
    'reconstruction and image swapped': ('networks', 'torch.cat([reconstruction, x], dim=1)',
                                         'torch.cat([x, reconstruction], dim=1)', 'test_golden', 'networks and eval'),
    'skip and upsampled part swapped': ('networks', 'torch.cat([up(x), skip], dim=1)',
                                        'torch.cat([skip, up(x)], dim=1)', 'test_golden', 'networks and eval'),
    'reconstruction detached': ('networks', 'torch.cat([reconstruction, x], dim=1)',
                                'torch.cat([reconstruction.detach(), x], dim=1)', 'test_golden', 'six_joint'),
    'batch norm with another epsilon': ('networks', 'weight, bias, eps=eps), mean, var',
                                        'weight, bias, eps=1e-3), mean, var', 'test_networks', 'batch_norm'),
    'batch norm with another momentum': ('networks', 'self.running_mean.lerp_(mean, momentum)',
                                         'self.running_mean.lerp_(mean, 0.01)', 'test_networks', 'batch_norm'),
    'initial weights of another size': ('networks', 'm.weight.normal_(0, std, generator=generator)',
                                        'm.weight.normal_(0, 0.03, generator=generator)', 'test_networks', 'initial'),
    'L2 made L1': ('losses', 'F.mse_loss(reconstruction, target)', 'F.l1_loss(reconstruction, target)',
                   'test_golden', 'losses'),
    'MSGMS divided by 3': ('losses', 'return 1 - total / 4', 'return 1 - total / 3', 'test_losses', 'msgms'),
    'focal mask inverted': ('losses', 'target = mask.clamp(', 'target = (1 - mask).clamp(', 'test_golden', 'losses'),
    'focal exponent 1': ('losses', 'gamma: float = 2.', 'gamma: float = 1.', 'test_golden', 'losses'),
    'focal exponent of the recipe ignored': ('losses', 'mask, weights.focal_gamma)', 'mask)', 'test_losses', 'focal'),
    'SSIM with a wider window': ('losses', '(2 * 1.5**2)', '(2 * 2.0**2)', 'test_golden', 'losses'),
    'SSIM with another constant': ('losses', 'x.shape, 0.01**2, 0.03**2', 'x.shape, 0.01**2, 0.02**2',
                                   'test_golden', 'losses'),
    'SSIM weight on L2 as well': ('losses', 'weights.l2_weight * l2', 'weights.ssim_weight * l2',
                                  'test_losses', 'weight'),
    "the paper's decay 0.2": ('recipes', 'lr_decay=0.1)', 'lr_decay=0.2)', 'test_recipes', 'published'),
    'steps without whole epochs': ('recipes', 'math.ceil(self.epochs * math.ceil(n_images / self.batch))',
                                   'math.ceil(self.epochs * n_images / self.batch)', 'test_recipes', 'epoch'),
    'no learning-rate schedule': ('optimizers', 'recipe.lr_decay ** sum(', '1. ** sum(', 'test_training', 'published'),
    'the schedule never steps': ('training', 'for scheduler in self.schedulers: scheduler.step()', 'pass',
                                 'test_training', 'published'),
    'weight decay': ('optimizers', 'lr=recipe.lr, fused=fused)', 'lr=recipe.lr, fused=fused, weight_decay=1e-4)',
                     'test_training', 'published'),
    'other Adam betas': ('optimizers', 'lr=recipe.lr, fused=fused)', 'lr=recipe.lr, fused=fused, betas=(0.5, 0.999))',
                         'test_training', 'published'),
    'Muon without momentum': ('optimizers', "state['momentum'].mul_(momentum)", "state['momentum'].mul_(0)",
                              'test_optimizers', 'step_of_muon'),
    "momentum that is not Nesterov's": ('optimizers', "return kernel.grad + momentum * state['momentum']",
                                        "return state['momentum']", 'test_optimizers', 'step_of_muon'),
    'moves that are not orthogonal': ('optimizers', 'moves = orthogonalise(', 'moves = (lambda x: x / x.norm(dim=(1, '
                                      '2), keepdim=True))(', 'test_optimizers', 'step_of_muon'),
    'a Newton-Schulz step of another polynomial': ('optimizers', '3.4445, -4.7750, 2.0315', '3.4445, -4.7750, 1.5315',
                                                   'test_optimizers', 'singular'),
    'tall kernels not turned back': ('optimizers', 'return x.mT if tall else x', 'return x',
                                     'test_optimizers', 'singular'),
    'filters of any norm after a step': ('optimizers', "_unit_filters(kernel - group['lr'] * move.view_as(kernel))",
                                         "kernel - group['lr'] * move.view_as(kernel)", 'test_optimizers',
                                         'step_of_muon'),
    'Muon on the first kernel too': ('optimizers', 'isinstance(m, nn.Conv2d)][1:-1]', 'isinstance(m, nn.Conv2d)][:-1]',
                                     'test_optimizers', 'inner_kernels'),
    'kernels that two optimisers train': ('optimizers', 'if id(p) not in known] + list(extra)', '] + list(extra)',
                                          'test_optimizers', 'inner_kernels'),
    'side heads that nobody trains': ('optimizers', 'not in known] + list(extra)', 'not in known]', 'test_optimizers',
                                      'inner_kernels'),
    'side heads at another weight of MSE': ('supervision', '+ 10 * F.mse_loss', '+ F.mse_loss', 'test_optimizers',
                                            'side_heads_is'),
    'side heads that hear one channel': ('supervision', 'target.mean(1, keepdim=True)', 'target[:, :1]',
                                         'test_optimizers', 'side_heads_is'),
    'side heads that the net does not hear': ('supervision', 'self.outputs[i] = output', 'self.outputs[i] = '
                                              'output.detach()', 'test_optimizers', 'reaches_every_layer'),
    'one side head too late': ('supervision', "'decoder.db3': (1, 2)}", "'decoder.db4': (1, 1)}", 'test_optimizers',
                               'reaches_every_layer'),
    'side heads that never fade': ('supervision', 'max(0., 1 - share / 0.9)', '1.', 'test_optimizers', 'falls_to_zero'),
    'side heads that see the painted image': ('training', 'self.heads.loss(batch.target)',
                                              'self.heads.loss(batch.augmented)', 'test_training', 'clean_image'),
    'side heads kept in the checkpoint': ('training', 'if self.done < self.total:', 'if True:',
                                          'test_training', 'no_trace'),
    'own share ignored': ('simulator', 'own := torch.rand(n, generator=g) < recipe.own_share',
                          'own := torch.rand(n, generator=g) < 0', 'test_simulator', 'own_share'),
    'own sources fainter than half': ('simulator', 'uniform(0.5, 1., int(own.sum()), g)',
                                      'uniform(0.2, 1., int(own.sum()), g)', 'test_simulator', 'own_share'),
    'own sources from one image': ('simulator', 'own_image=torch.randint(n_images, (n,), generator=g)',
                                   'own_image=torch.randint(1, (n,), generator=g)', 'test_simulator', 'own_share'),
    'own sources moved along the other axes': ('simulator', '(int(down * height), int(right * width)), (1, 2))',
                                               '(int(down * height), int(right * width)), (2, 1))', 'test_simulator',
                                               'own_source'),
    'own sources of another contrast': ('simulator', '(image - mean) * (0.7 + 0.6 * contrast)',
                                        '(image - mean) * (0.6 + 0.6 * contrast)', 'test_simulator', 'own_source'),
    'own sources in the wrong anomaly': ('simulator', 'torch.where(plan.own, plan.own.cumsum(0) - 1, -1)',
                                         'torch.where(plan.own, 0, -1)', 'test_simulator', 'own_source'),
    'initial weights that ignore the seed': ('training', 'manual_seed(recipe.seed)', 'manual_seed(0)',
                                             'test_training', 'random_choice'),
    'held-out images that ignore the seed': ('training', 'default_rng([recipe.seed, 2])', 'default_rng([0, 2])',
                                             'test_training', 'random_choice'),
    'textures in another channel order': ('training', 'if bgr: textures = textures.flip(1)', 'pass',
                                          'test_training', 'channel_order'),
    'noise that turns one way only': ('simulator', 'uniform(-recipe.perlin_rotation,', 'uniform(0,', 'test_simulator',
                                      'turns_both_ways'),
    'images that turn one way only': ('simulator', 'uniform(-recipe.rotation_degrees,', 'uniform(0,', 'test_simulator',
                                      'turn_both_ways'),
    'a permutation that ignores the seed': ('simulator', 'generator_of(seed, 1, e)', 'generator_of(1, e)',
                                            'test_simulator', 'permutation'),
    'a plan that ignores the seed': ('simulator', 'generator_of(seed, 0, step)', 'generator_of(0, step)',
                                     'test_simulator', 'seed_and_step'),
    'a plan that ignores the step': ('simulator', 'generator_of(seed, 0, step)', 'generator_of(seed, 0)',
                                     'test_simulator', 'seed_and_step'),
    'the largest Perlin scale never drawn': ('simulator', 'high + 1, (n, 2)', 'high, (n, 2)', 'test_simulator',
                                             'both_scales'),
    'gray values in another channel order': ('simulator', "weights if recipe.color == 'rgb' else weights[::-1].copy()",
                                             'weights', 'test_simulator', 'red_texture'),
    'opacity of the image, not the texture': ('simulator', 'opacity=plan.opacity, ', 'opacity=1 - plan.opacity, ',
                                              'test_simulator', 'opacity_is'),
    'every texture solarized': ('textures', "index('solarize')) & (u[..., 4] < .5)",
                                "index('solarize')) & (u[..., 4] < 0)",
                                'test_textures', 'draws'),
    'noise turned clockwise': ('compiled', '_turn_noise(memory.noise, mask.shape, work.mask_degrees[a]',
                               '_turn_noise(memory.noise, mask.shape, -work.mask_degrees[a]', 'test_simulator',
                               'noise_turns_by'),
    'soft edges that are hard': ('compiled', 'beta = work.opacity[a] * weights[p]', 'beta = work.opacity[a]',
                                 'test_simulator', 'soft_anomaly'),
    'soft edges twice as wide': ('compiled', '(work.softness[a] * highest)', '(2 * work.softness[a] * highest)',
                                 'test_simulator', 'soft_anomaly'),
    'gamma rounded': ('compiled', '** strength[channel] * _255)', '** strength[channel] * _255 + _HALF)',
                      'test_textures', 'imgaug and gamma'),
    "Pillow's equalize": ('compiled', '(counts.sum() - counts[255]) // 255', '(counts.sum() - '
                          'counts[np.nonzero(counts)[0][-1]]) // 255', 'test_textures', 'equalize and imgaug'),
    'the sum first, always': ('compiled', 'elif strength[3] == 0: table[v]', 'elif strength[3] < 0: table[v]',
                              'test_textures', 'imgaug and multiply_add'),
    'the scales of the axes swapped': ('perlin', '_axis_basis(H, rows), _axis_basis(W, cols)',
                                       '_axis_basis(H, cols), _axis_basis(W, rows)', 'test_perlin', 'definition'),
    'compiled passes that are not recorded': ('training', "mode='reduce-overhead' if", "mode='default' if",
                                              'test_training', 'records_compiled'),
    'compiled steps that are not marked': ('training', 'torch.compiler.cudagraph_mark_step_begin()', 'pass',
                                           'test_training', 'records_compiled'),
    'a net that is compiled twice': ('supervision', '[torch.empty(0)] * len(_LAYERS)', '{}', 'test_training',
                                     'compiled_steps'),
    'a snapshot one step late': ('training', 'trainer.done in snapshots)', 'trainer.done - 1 in snapshots)',
                                 'test_training', 'snapshot'),
    'the pixel floor a ceiling': ('detector', 'max(detector.pixel_floor,', 'min(detector.pixel_floor,',
                                  'test_detector', 'floor'),
    'a score that does not count the padding': ('detector', '(0, window // 2))', '(0, window // 2), '
                                                'count_include_pad=False)', 'test_detector', 'padding'),
    'the quantile one too low': ('detector', 'math.ceil(quantile * values.size)', 'math.floor(quantile * values.size)',
                                 'test_detector', 'upper_quantile'),
    'a threshold that is reached is exceeded': ('detector', 'else values > threshold', 'else values >= threshold',
                                                'test_detector', 'exceeded'),
    'reconstructions left in BGR': ('detector', "values.flip(1) if color == 'bgr' else values", 'values',
                                    'test_detector', 'channel_order'),
    'images antialiased whatever the recipe says': ('detector', 'recipe.color, recipe.antialias',
                                                    'recipe.color, True', 'test_detector', 'without_antialiasing'),
    'an error map of differences, not squares': ('autoencoder', '(image - reconstruction).square()',
                                                 '(image - reconstruction).abs()', 'test_autoencoder', 'the_map'),
    'no weight decay in the autoencoder': ('autoencoder', 'recipe.lr, weight_decay=recipe.weight_decay',
                                           'recipe.lr, weight_decay=0.', 'test_autoencoder', 'adams'),
    'mirrored whatever the recipe says': ('autoencoder', 'if recipe.flips:', 'if True:', 'test_autoencoder',
                                          'mirrored'),
    'images mirrored along one axis alone': ('autoencoder', 'for axis in (2, 3)', 'for axis in (2,)',
                                             'test_autoencoder', 'mirrored'),
    'an autoencoder that sees held-out images': ('autoencoder', 'category.train[kept].to', 'category.train.to',
                                                 'test_autoencoder', 'held_out'),
    'first weights for ReLU': ('autoencoder', '(1 + 0.2**2) * inputs', '1.5 * inputs', 'test_autoencoder',
                               'first_weights'),
    'first weights that ignore the stride': ('autoencoder', '(math.prod(m.stride)', '(1', 'test_autoencoder',
                                             'first_weights'),
    'an autoencoder that ignores the seed': ('autoencoder', 'manual_seed(recipe.seed)', 'manual_seed(0)',
                                             'test_autoencoder', 'same_bits'),
    'pastes turned the other way': ('cutpaste', 'dy * cos + dx * sin, dx * cos - dy * sin',
                                    'dy * cos - dx * sin, dx * cos + dy * sin', 'test_cutpaste', 'turned_box'),
    'pastes cut half a pixel off': ('cutpaste', 'device=images.device) + 0.5 for n', 'device=images.device) for n',
                                    'test_cutpaste', 'comes_from'),
    'pastes of twice the width': ('cutpaste', 'u.abs() < sides[:, 1] / 2', 'u.abs() < sides[:, 1]', 'test_cutpaste',
                                  'comes_from'),
    'hue turned the other way': ('cutpaste', 'cut.roll(1, 1) - cut.roll(-1, 1)', 'cut.roll(-1, 1) - cut.roll(1, 1)',
                                 'test_cutpaste', 'colours'),
    'the contrast about the mean of the image': ('cutpaste', '(gray(cut) * mask)', '(gray(cut) + 0 * mask)',
                                                 'test_cutpaste', 'colours'),
    'wide patches only': ('cutpaste', 'torch.randint(len(ratios), (n,), generator=g)',
                          'torch.randint(1, (n,), generator=g)', 'test_cutpaste', 'patches_have'),
    'scars that turn one way only': ('cutpaste', 'uniform(-recipe.scar_degrees,', 'uniform(0,', 'test_cutpaste',
                                     'scars_have'),
    'a CutPaste plan that ignores the step': ('cutpaste', 'generator_of(recipe.seed, 3, *window, step)',
                                              'generator_of(recipe.seed, 3, *window)', 'test_cutpaste', 'a_plan'),
    'a distance without the square root of the covariance': ('cutpaste', 'torch.linalg.cholesky(torch.from_numpy('
                                                             'found.precision_))', 'torch.from_numpy(found.precision_)',
                                                             'test_cutpaste', 'mahalanobis'),
    'a distance by the wrong triangle': ('cutpaste', '@ self.whiten)', '@ self.whiten.T)', 'test_cutpaste',
                                         'mahalanobis'),
    'a bell twice as wide': ('cutpaste', '(offset / (patch / 6))', '(offset / (patch / 3))', 'test_cutpaste',
                             'weighted_mean'),
    'patches that overlap twice as much': ('cutpaste', '.unfold(3, patch, stride).permute(0, 2, 3',
                                           '.unfold(3, patch, stride).permute(0, 3, 2', 'test_cutpaste',
                                           'every_patch'),
    'a rate that does not fall': ('cutpaste', 'in (optimizer, scheduler):', 'in (optimizer,):', 'test_cutpaste',
                                  'cosine'),
    'maps above half on normal images': ('cutpaste', "distance(features['patches']).max())",
                                         "distance(features['patches']).mean())", 'test_cutpaste', 'maps_and_scores'),
    'ties that count as found': ('metrics', '2 * groups.n_normals - groups.above - groups.at_least',
                                 '2 * groups.n_normals - 2 * groups.above', 'test_metrics', 'sklearn'),
    'precision without ties': ('metrics', 'groups.found / (groups.found + groups.at_least)',
                               'groups.found / (groups.found + groups.above)', 'test_metrics', 'sklearn'),
    'the lowest threshold of the largest F1': ('metrics', 'groups.score[f1.argmax()]', 'groups.score[-1]',
                                               'test_metrics', 'bounds'),
    'regions of four neighbours': ('metrics', 'structure=np.ones((3, 3))', 'structure=None', 'test_metrics',
                                   'corners'),
    'AUPRO that is not divided by its limit': ('metrics', 'return float(area) / limit', 'return float(area)',
                                               'test_metrics', 'aupro'),
    'AUPRO without the piece that crosses the limit': ('metrics', 'if cut < x.size:', 'if False:', 'test_metrics',
                                                       'aupro'),
    'large regions count more': ('metrics', '1 / np.bincount(label)[label]', 'np.ones(label.size)', 'test_metrics',
                                 'aupro'),
    'a bootstrap of all images together': ('metrics', 'labels == value) for value in (False, True)',
                                           'labels >= value) for value in (False,)', 'test_metrics', 'bootstrap'),
    'a bootstrap that ignores its seed': ('metrics', 'default_rng(seed)', 'default_rng(0)', 'test_metrics',
                                          'bootstrap'),
    "Wilson's centre at the rate": ('evaluation', 'p + z * z / (2 * n)', 'p', 'test_evaluation', 'wilson'),
    'false alarms among all images': ('evaluation', 'alarms / good if good', 'alarms / len(labels) if good',
                                      'test_evaluation', 'operating_point'),
    'a score at the threshold called': ('evaluation', 'found.scores > threshold', 'found.scores >= threshold',
                                        'test_evaluation', 'operating_point'),
    'recall of all calls': ('evaluation', 'recall=hits / bad if bad', 'recall=hits / (hits + alarms) if bad',
                            'test_evaluation', 'operating_point'),
    'intervals of 90 %': ('evaluation', 'np.nanquantile(values, (0.025, 0.975))',
                          'np.nanquantile(values, (0.05, 0.95))', 'test_evaluation', 'bootstrap'),
    'draws of good and defective images together': ('evaluation', '(np.flatnonzero(~defect), np.flatnonzero(defect))',
                                                    '(np.arange(defect.size),)', 'test_evaluation', 'bootstrap'),
    'a difference the other way round': ('evaluation', 'difference=second - first', 'difference=first - second',
                                         'test_evaluation', 'compare'),
    'draws that are not paired': ('evaluation', 'np.nanquantile(draws[1] - draws[0],',
                                  'np.nanquantile(draws[1] - draws[0][::-1],', 'test_evaluation', 'compare'),
    'kinds without the good images': ('evaluation', "np.isin(kinds, ['good', *names])", 'np.isin(kinds, names)',
                                      'test_evaluation', 'metrics'),
    'the rule half for both rules': ('evaluation', '(category.masks, category.masks_official)',
                                     '(category.masks, category.masks)', 'test_evaluation', 'other_mask_rule'),
    'medians of seeds': ('evaluation', 'groups[[*_OURS]].mean()', 'groups[[*_OURS]].median()', 'test_evaluation',
                         'seeds'),
}


def fails(library: Path, file: str, which: str) -> bool:
    "Whether the tests find something wrong with the copy of the library."
    environment = os.environ | dict(PYTHONPATH=str(library), PYTHONDONTWRITEBYTECODE='1', OMP_NUM_THREADS='1')
    command = [Path(sys.executable).with_name('pytest'), '-q', '-x', '-p', 'no:cacheprovider', f'tests/{file}.py', '-k',
               which]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1): raise SystemExit(f'{file} -k {which!r} did not run:\n{done.stdout}{done.stderr}')
    return done.returncode == 1


def main(wanted: list[str]) -> None:
    "Every fault that is asked for: planted, tested, taken out again."
    faults = {name: row for name, row in FAULTS.items() if not wanted or any(w in name for w in wanted)}
    with tempfile.TemporaryDirectory() as folder:
        library, survivors = Path(folder), []
        shutil.copytree(ROOT / 'draem_nb', library / 'draem_nb')
        for file, which in {row[3:]: None for row in faults.values()}:
            if fails(library, file, which): raise SystemExit(f'{file} -k {which!r} fails without any fault')
        for name, (module, text, other, file, which) in faults.items():
            path, before = library / 'draem_nb' / f'{module}.py', time.perf_counter()
            whole = path.read_text()
            if whole.count(text) != 1:
                raise SystemExit(f'{name}: {text!r} stands {whole.count(text)} times in {module}.py, not once')
            path.write_text(whole.replace(text, other))
            if not fails(library, file, which): survivors.append(name)
            path.write_text(whole)
            print(f'{"SURVIVES" if name in survivors[-1:] else "caught":8} {name} ({file}, '
                  f'{time.perf_counter() - before:.0f} s)', flush=True)
    print(f'{len(faults) - len(survivors)} of {len(faults)} faults caught')
    if survivors: raise SystemExit('nobody noticed: ' + '; '.join(survivors))


if __name__ == '__main__': main(sys.argv[1:])
