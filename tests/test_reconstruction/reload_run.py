"""Load a reconstructed model in a process of its own, run and convert it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = os.environ['TEST_PATHS'].split(':')

import torch  # noqa: E402
from reconstructing import make_model  # noqa: E402


@torch.no_grad()
def main() -> None:
    folder = Path(sys.argv[1])
    saved = torch.load(folder / 'saved.pth')
    model = make_model()
    model.load_state_dict(saved['state'])
    model.set_quant_state(False, True, False, True)
    torch.save(dict(quantized=model(saved['x']), converted=model.convert()(saved['x'])), folder / 'outputs.pth')


if __name__ == '__main__':
    main()
