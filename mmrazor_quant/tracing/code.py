"""Python functions that run graphs."""

from __future__ import annotations

import ast
from collections.abc import Callable

from torch import fx

MAX_VARIABLES = 256
"""Functions of longer graphs have their values share variables; those of shorter ones do without, as it takes time."""


def code_of(graph: fx.Graph) -> str:
    """Returns the code of a graph; tensors that are constants of it have names of their own."""
    return graph.python_code('self').src


def compile_graph(graph: fx.Graph) -> Callable:
    """Returns a function ``forward(module, *inputs)`` that runs a graph over the submodules of ``module``."""
    code = graph.python_code('self')
    program = ast.parse(code.src) if len(graph.nodes) > MAX_VARIABLES else code.src
    for statement in getattr(program, 'body', ()):
        if isinstance(statement, ast.FunctionDef):
            share_variables(statement)
    namespace = dict(code.globals)
    exec(compile(program, '<captured forward>', 'exec'), namespace)
    return namespace['forward']


def share_variables(function: ast.FunctionDef) -> None:
    """Lets values that do not live at the same time share a variable, in a function without branches.

    A value ends where its variable is set to None, which the code of a graph does after each last use. The function of
    a large network then has tens of variables, not thousands. Python keeps the variables of all running functions in
    blocks of 16 KiB: where one function fills a block, each call that it makes gets a new one from the operating system
    and gives it back, which stops all threads each time.

    Args:
        function: is changed; it sets each variable once, and then possibly to None.
    """
    variables = {argument.arg: argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)}
    free: list[str] = []
    for statement in function.body:
        names = _names_set_by(statement)
        for name in names:
            if name not in variables:
                variables[name] = free.pop() if free else name
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                node.id = variables.get(node.id, node.id)
        if names and isinstance(statement.value, ast.Constant) and statement.value.value is None:
            free += [variables.pop(name) for name in names]


def _names_set_by(statement: ast.stmt) -> list[str]:
    targets = getattr(statement, 'targets', None) or [getattr(statement, 'target', None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]
