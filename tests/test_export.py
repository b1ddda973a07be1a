"An exported detector: its own channel order, resizing and region, with and without thresholds."
import json

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from PIL import Image

from draem_nb.detector import Detector
from draem_nb.export import check_export, export_onnx, export_openvino, summary
from draem_nb.networks import Draem
from draem_nb.recipes import demo


@pytest.mark.parametrize('color, antialias, size, region', [
    ('rgb', True, (32, 64), False), ('bgr', True, 64, False), ('bgr', False, 64, False), ('rgb', True, 64, True)])
def test_files_of_any_size_get_the_scores_and_verdicts_of_pytorch(tmp_path, color, antialias, size, region):
    torch.manual_seed(0)
    recipe = demo().replace(size=size, color=color, antialias=antialias, base_width=4, base_channels=4,
                            precision='float32')
    detector = Detector(Draem(4, 4).eval(), recipe, 'cpu')
    if region: detector.region = torch.arange(64)[:, None] + torch.zeros(64) < 40
    for i, (width, height) in enumerate([(200, 133), (64, 64), (40, 50)]):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f'{i}.png')
    images = sorted(tmp_path.glob('*.png'))
    file = export_onnx(detector, tmp_path / 'plain.onnx')
    assert [out.name for out in onnxruntime.InferenceSession(str(file)).get_outputs()] == ['map', 'score']
    scores = detector.predict(images).scores.sort().values
    detector.threshold, detector.pixel_threshold = float(scores[:2].mean()), 0.5
    checked = check_export(detector, export_onnx(detector, tmp_path / 'whole.onnx'), images)
    assert summary(checked)['largest map difference'] < 1e-2 and not checked['verdict differs'].any()
    file = export_openvino(detector, tmp_path / 'whole.xml')
    checked = check_export(detector, file, images)
    assert summary(checked)['largest map difference'] < 1e-2 and not checked['verdict differs'].any()
    model = openvino.Core().read_model(file)
    assert model.get_rt_info(['draem_nb', 'threshold']).astype(float) == detector.threshold
    about = onnxruntime.InferenceSession(str(tmp_path / 'whole.onnx')).get_modelmeta().custom_metadata_map
    assert json.loads(about['threshold']) == detector.threshold and json.loads(about['recipe'])['color'] == color
    if region:
        pixels = np.full((1, 3, 64, 64), 128, np.uint8)
        session = onnxruntime.InferenceSession(str(tmp_path / 'whole.onnx'))
        plain = session.run(['map', 'score'], {'image': pixels})
        pixels[:, :, 40:] = 255                                         # a defect outside
        outside = session.run(['map', 'score'], {'image': pixels})
        assert all(np.array_equal(a, b) for a, b in zip(plain, outside)) and not outside[0][0, 0, 40:].any()
