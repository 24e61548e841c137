"""One folder a backend; its table says where and how it takes quantized tensors."""

from .academic.rules import RULES as ACADEMIC
from .rules import Rules

BACKENDS = {rules.name: rules for rules in (ACADEMIC,)}

__all__ = ['BACKENDS', 'Rules']
