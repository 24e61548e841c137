"""Makes pip forget packages that an interrupted installation left half installed.

Runs inside the virtual environment. pip takes a package for installed as soon as its metadata folder
is there; without that folder it installs the package again, over whatever files are left.
"""

from __future__ import annotations

import csv
import shutil
import sysconfig
from pathlib import Path


def is_complete(metadata: Path) -> bool:
    """Tells whether every file that a package's RECORD lists is there."""
    record = metadata / 'RECORD'
    if not record.exists():
        return False
    with record.open(newline='', encoding='utf-8') as stream:
        names = [row[0] for row in csv.reader(stream) if row and not row[0].endswith('.pyc')]
    return all((metadata.parent / name).exists() for name in names)


def is_graphical_opencv(metadata: Path) -> bool:
    """Tells whether this is the OpenCV that needs libGL."""
    return metadata.name.startswith('opencv_python-')


def main() -> None:
    """Removes the metadata of incomplete packages, and pip's own leftovers."""
    site_packages = Path(sysconfig.get_path('purelib'))
    # pip renames what it is about to replace to "~..." and removes it at the end.
    for leftover in site_packages.glob('~*'):
        shutil.rmtree(leftover)
    folders = sorted(site_packages.glob('*.dist-info'))
    broken = [folder for folder in folders if not is_complete(folder) or is_graphical_opencv(folder)]
    if any(map(is_graphical_opencv, broken)):
        # Both kinds unpack into cv2/, so the headless one has to be written again.
        broken += [folder for folder in folders if folder.name.startswith('opencv_python_headless-')]
        shutil.rmtree(site_packages / 'cv2', ignore_errors=True)
    for folder in set(broken):
        print(f'to be installed again: {folder.name}')
        shutil.rmtree(folder)


if __name__ == '__main__':
    main()
