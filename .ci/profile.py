"""Lay a profile over the committed params.yaml: `python .ci/profile.py NAME`.
What was edited by hand is not overwritten."""
import subprocess
import sys
from pathlib import Path

from foundir_v2.config import ConfigError, overlay

root = Path(__file__).resolve().parents[1]
profiles = {p.stem: p.read_text(encoding='utf-8') for p in sorted((root / 'profiles').glob('*.yaml'))}
name = sys.argv[1] if len(sys.argv) > 1 else ''
if name not in profiles: sys.exit(f'profile {name!r} is none of: {", ".join(profiles)}')
git = subprocess.run(['git', 'show', 'HEAD:./params.yaml'], cwd=root, capture_output=True, text=True)
if git.returncode: sys.exit(f'no committed params.yaml to lay a profile over: {git.stderr.strip()}')
try:
    laid = {n: overlay(git.stdout, text) for n, text in profiles.items()}
except ConfigError as e: sys.exit(f'profiles/: {e}')
params = root / 'params.yaml'
if params.exists() and params.read_text(encoding='utf-8') not in laid.values():
    sys.exit('params.yaml has changes of its own: commit them, or drop them with `git checkout params.yaml`')
params.write_text(laid[name], encoding='utf-8')
print(f'params.yaml now holds the profile {name}')
