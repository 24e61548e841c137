"""The ``mmrazor`` scope: where everything this package adds can be named in a config.

A config says ``type='mmrazor.GeneralQuant'`` whatever its ``default_scope`` is. mmengine looks the name up in
the child registry of that scope, so importing :mod:`mmrazor_quant` (``custom_imports`` in foreign scripts, the
tools of this project by themselves) is all that is needed.
"""

from mmengine import registry as _root
from mmengine.registry import Registry

SCOPE = 'mmrazor'


def _child(parent: Registry) -> Registry:
    """Make the child of one of mmengine's root registries in our scope.

    ``locations`` must not be empty: mmengine knows a package called ``mmrazor`` and would, without them, try to
    import it on the first look-up and warn that it is not installed.

    Args:
        parent: Root registry of mmengine.

    Returns:
        Its child of scope ``mmrazor``.
    """
    return Registry(parent.name, parent=parent, scope=SCOPE, locations=['mmrazor_quant'])


MODELS = _child(_root.MODELS)
"""Algorithms, quantizers, observers and fake quantizers."""

TASK_UTILS = _child(_root.TASK_UTILS)
"""Tracers."""

LOOPS = _child(_root.LOOPS)
"""PTQ and QAT loops."""

HOOKS = _child(_root.HOOKS)
"""Hooks that the loops of this package rely on."""

OPTIM_WRAPPER_CONSTRUCTORS = _child(_root.OPTIM_WRAPPER_CONSTRUCTORS)
"""Constructors that know of learned quantization parameters."""

# With ``default_scope='mmrazor'`` mmengine logs a warning for every registry that has no child of that name, on
# every build: give the ones we have nothing to add to an empty child, which falls back to its parent.
for _registry in [r for r in vars(_root).values() if isinstance(r, Registry)]:
    if SCOPE not in _registry.children:
        _child(_registry)
