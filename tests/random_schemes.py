"""Schemes and magnitudes for tests of properties that hold for all of them."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st

from mmrazor_quant.qscheme import QScheme

magnitudes = st.floats(-6, 6).map(lambda e: 10.0**e)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def schemes(draw: st.DrawFn, **fixed: Any) -> QScheme:
    """Any scheme that is allowed, with some fields given."""
    fields = dict(bit=draw(st.integers(1, 32)), is_symmetry=draw(st.booleans()), is_pot_scale=draw(st.booleans()))
    fields['is_signed'] = draw(st.sampled_from([None, True, False]))
    fields['is_per_channel'] = draw(st.booleans())
    fields.update(fixed)
    signed = fields['is_symmetry'] if fields['is_signed'] is None else fields['is_signed']
    fields.setdefault('is_symmetric_range', draw(st.booleans()) and signed and fields['bit'] > 1)
    return QScheme(**fields)
