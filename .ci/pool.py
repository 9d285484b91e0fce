"""Three small data sets from the fetched photographs, one of them in FOLDER outside of the repository, and params.yaml
with them: `python .ci/pool.py FOLDER`. For .ci/smoke."""
import shutil
import sys
from pathlib import Path

from foundir_v2.config import overlay
from foundir_v2.core import load_image, save_image
from foundir_v2.degrade import degrade
from foundir_v2.fetch import read_sources

outside, sets = Path(sys.argv[1]), Path('sets')
photographs = [Path('data') / s.file for s in read_sources('data') if s.split == 'train']
fits = [p for p in photographs if min(load_image(p).shape[1:]) >= 300]
for i, path in enumerate(fits[:4]):  # several hazy pictures per clear one
    part, gt = outside / 'RESIDE' / ('SOTS/outdoor' if i == 3 else 'ITS'), load_image(path)
    save_image(gt, part / f'clear/{i}.png')
    for k in (1, 2): save_image(degrade(gt, 'haze', k), part / f'hazy/{i}_{k}_0.9.png')
for i, path in enumerate(fits[4:7]):  # sizes that are no multiple of four
    gt = load_image(path)[:, :299, :298]
    save_image(gt, sets / f'DIV2K/DIV2K_train_HR/{i:04}.png')
    save_image(degrade(gt[:, :296, :296], 'sr_x4', i), sets / f'DIV2K/DIV2K_train_LR_bicubic/X4/{i:04}x4.png')
for path in fits[7:20]:
    (sets / 'mine').mkdir(parents=True, exist_ok=True)
    shutil.copy(path, sets / 'mine')
params = Path('params.yaml')
params.write_text(overlay(params.read_text(encoding='utf-8'), f'''
ingest:
  datasets:
  - name: reside
    root: {outside}/RESIDE
    layout: reside
  - name: div2k
    root: {sets}/DIV2K
    layout: div2k_x4
    split: train
  - name: mine
    root: {sets}/mine
    layout: photographs
    weight: 2
    split:
      reference: 3
      test: 3
  min_side: 256
'''), encoding='utf-8')
