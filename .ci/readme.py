"README.md from nbs/index.ipynb: `python .ci/readme.py [OUT]`. Cells that begin with `#| hide` are left out."
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]
nb = nbformat.read(root / 'nbs' / 'index.ipynb', 4)
nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*hide\b', c.source)]
nb.metadata.language_info = {'name': 'python'}
body, resources = MarkdownExporter().from_notebook_node(nb)
assert not resources.get('outputs'), (
    'index.ipynb has picture outputs: link to a file instead, a README has no place for them')
note = '<!-- Generated from nbs/index.ipynb by `make readme`: edit the notebook. -->\n'
Path(sys.argv[1] if len(sys.argv) > 1 else root / 'README.md').write_text(
    note + re.sub(r'\n{3,}', '\n\n', body).strip() + '\n', encoding='utf-8')
