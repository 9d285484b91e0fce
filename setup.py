"""Packaging. What the library needs, by who uses it; name and version have their home in settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
settings = ConfigParser()
settings.read(here / 'settings.ini', encoding='utf-8')
cfg = settings['DEFAULT']

readme = here / 'README.md'
core = ['torch>=2.7', 'diffusers>=0.40', 'transformers>=5.0', 'accelerate>=1.3', 'safetensors>=0.4', 'Pillow>=10.1',
        'numpy>=2.0', 'fsspec>=2024.2', 'tqdm>=4.66', 'annotated-types>=0.6', 'fastcore>=1.12']
metrics = ['pyiqa>=0.1.14', 'pandas>=2.0', 'pyarrow>=15']
pipeline = ['dvc>=3.50', 'dvclive>=3.40', 'papermill>=2.6', 'jupyterlab>=4.0', 'ipykernel>=6.29', 'nbdev==2.4.14',
            'execnb==0.1.18', 'fastcore==1.12.47', 'ghapi==1.0.16', 'fastgit==0.0.6', 'ruamel.yaml>=0.18',
            'pandas>=2.0', 'pyarrow>=15', 'matplotlib>=3.8', 'scipy>=1.11', 'scikit-image>=0.22', 'psutil>=5.9',
            'filelock>=3.25', 'albumentations==2.0.8', 'imagecodecs>=2024.9', 'timm>=1.0.22',
            'open_clip_torch>=3.0', 'requests>=2.31', 'spandrel>=0.4']

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords=cfg['keywords'].split(),
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=['foundir_v2', 'foundir_v2.*']),
    package_data={'foundir_v2': ['assets/**/*']},
    install_requires=core,
    extras_require=dict(metrics=metrics, pipeline=pipeline, all=sorted({*metrics, *pipeline})),
    entry_points=dict(console_scripts=['foundir-v2=foundir_v2.cli:main']),
    zip_safe=False,
    classifiers=['Programming Language :: Python :: 3', 'Intended Audience :: Science/Research'],
)
