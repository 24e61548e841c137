"""Assertions about what tensors hold: a graph can make them, too, where any other branch on data cannot be followed."""

from __future__ import annotations

import dis
import sys
from pathlib import Path
from types import FrameType

import torch

_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def check_holds(value: torch.Tensor, expected: bool) -> None:
    """Raises AssertionError unless a tensor has the truth that the traced code asserted."""
    # Without data (a run for sizes only) nothing can be said.
    if not value.is_meta and bool(value) is not expected:
        raise AssertionError(f'the captured code asserts that a tensor is {expected}, it is {value.tolist()}')


def is_asserting() -> bool:
    """Tells whether the code under trace is evaluating the condition of an ``assert`` statement."""
    frame = _traced_frame()
    return frame is not None and _fails_to_assertion(frame)


def _traced_frame() -> FrameType | None:
    """Returns the innermost frame that is neither torch's nor of this package's tracer."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    return frame


def _fails_to_assertion(frame: FrameType) -> bool:
    """Tells whether the instruction that runs is a jump around ``raise AssertionError``."""
    instructions = [i for i in dis.get_instructions(frame.f_code) if i.opname not in ('CACHE', 'TO_BOOL', 'NOT_TAKEN')]
    later = [i for i in instructions if i.offset >= frame.f_lasti]
    return len(later) > 1 and _is_jump(later[0]) and later[1].opname.startswith('LOAD_ASSERTION_ERROR')


def _is_jump(instruction: dis.Instruction) -> bool:
    return instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs
