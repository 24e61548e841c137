"""Every example in README.md and docs/ runs.

What a fenced block means:

* ```python: run, all blocks of a file in order and in one namespace, in an empty folder. A block whose first line is
  ``# config: NAME.py`` or ``# module: NAME.py`` is written to that file instead, a config also loaded and built.
* ```bash: each command is checked. ``make`` targets must exist. Python scripts must exist and show their help, and the
  options given must be among it. A command on files that the document wrote is run; one on the configs of this
  repository is not, but they must load.
* ```text after a python or bash block: lines of what it printed or logged, in this order, or the error that it ends in
  (``Type: message`` after python); ``...`` stands for anything in a line.

A python block whose first line is ``# needs: PATH`` is skipped where that path, relative to the repository, is missing.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmrazor_quant import ops
from mmrazor_quant.engine.launch import register_codebase
from mmrazor_quant.registry import LOOPS, MODELS, TASK_UTILS

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = [REPOSITORY / 'README.md', *sorted((REPOSITORY / 'docs').glob('**/*.md'))]
LINKED = ('tools', 'configs', 'Makefile', 'requirements.txt')
"""What commands in the documents name relative to the root of the repository."""

FENCE = re.compile(r'^```(\w+)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
LINK = re.compile(r'\]\(([^)#\s]+)(#[^)\s]+)?\)')


@dataclass(frozen=True)
class Block:
    """One fenced block of a document."""

    language: str
    text: str
    line: int

    def directive(self, name: str) -> str | None:
        """Value of a first line ``# name: value``, if that is what the block begins with."""
        first, _, _ = self.text.partition('\n')
        prefix = f'# {name}: '
        return first[len(prefix) :].strip() if first.startswith(prefix) else None


def blocks_of(document: Path) -> list[Block]:
    """Fenced blocks of a document, in order."""
    text = document.read_text(encoding='utf-8')
    return [Block(m[1], m[2], text.count('\n', 0, m.start()) + 1) for m in FENCE.finditer(text)]


class DocumentRun:
    """Runs the blocks of one document in the current folder."""

    def __init__(self, document: Path) -> None:
        self.name = document.name
        self.namespace = {'__name__': '__main__'}
        self.output = ''
        self.skipped: list[str] = []

    def run(self, block: Block, following: Block | None) -> None:
        """Run, write, check or compare a block; an error that the block after it shows is its output."""
        if block.language == 'python':
            try:
                self._python(block)
            except Exception as error:
                title = f'{type(error).__name__}: '
                if following is None or following.language != 'text' or not following.text.startswith(title):
                    raise
                self.output = f'{title}{error}'
        elif block.language == 'bash':
            self.output = ''.join(self._command(line) for line in commands_of(block))
        elif block.language == 'text':
            self._compare(block)

    def _python(self, block: Block) -> None:
        needed = block.directive('needs')
        if needed is not None and not (REPOSITORY / needed).exists():
            self.skipped.append(needed)
            return
        target = block.directive('config') or block.directive('module')
        if target is not None:
            Path(target).write_text(block.text, encoding='utf-8')
            self.output = ''
            if block.directive('config'):
                self.output = captured(lambda: check_config(target))
            return
        # Compiled with the line numbers of the document, so that a traceback points into it.
        code = compile('\n' * block.line + block.text, self.name, 'exec')
        self.output = captured(lambda: exec(code, self.namespace))

    def _command(self, line: str) -> str:
        words = shlex.split(line, comments=True)
        environment = {}
        while words and re.fullmatch(r'[A-Z_]+=\S*', words[0]):
            key, _, value = words.pop(0).partition('=')
            environment[key] = value
        if words and words[0] == 'make':
            check_make_targets(words[1:])
        elif words and words[0] == 'python' and words[1].endswith('.py'):
            return self._script(words[1], words[2:], environment)
        else:
            assert words[0] in ('git', 'cd', 'pip', 'source'), f'unchecked command: {line}'
        return ''

    def _script(self, script: str, arguments: list[str], environment: dict[str, str]) -> str:
        assert Path(script).is_file(), f'{script} does not exist'
        check_options(script, arguments)
        configs = [argument for argument in arguments if argument.endswith('.py')]
        for config in configs:
            assert Path(config).is_file(), f'{config} does not exist'
        written_here = [config for config in configs if not Path(config).resolve().is_relative_to(REPOSITORY)]
        if not written_here:
            for config in configs:
                Config.fromfile(config)
            return ''
        return captured(lambda: run_script(script, arguments, environment))

    def _compare(self, block: Block) -> None:
        if not re.search(pattern_of(block.text), self.output):
            pytest.fail(f'{self.name}, line {block.line}: wanted\n{block.text}\nin the output\n{self.output}')


def pattern_of(text: str) -> str:
    """Regular expression for the lines of a text block, in order, with anything before, between and after them."""
    lines = [line.split() for line in text.splitlines() if line.strip() not in ('', '...')]
    words = (r'[^\S\n]+'.join(map(re.escape, line)).replace(r'\.\.\.', r'[^\n]*') for line in lines)
    return r'(?s:.*?)'.join(words)


def commands_of(block: Block) -> list[str]:
    """Commands of a shell block, one a line, continued lines joined."""
    lines = block.text.replace('\\\n', ' ').splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith('#')]


def captured(function: Callable[[], object]) -> str:
    """Call a function; returns what it printed."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        function()
    return stream.getvalue()


def check_config(path: str) -> None:
    """Load a config that a document wrote, and build its model: without weights where they are not at hand, and on \
    small images where it says no size."""
    cfg = Config.fromfile(path)
    scope = cfg.get('default_scope')
    register_codebase(scope)
    init_default_scope(scope or 'mmrazor')
    model = cfg.model
    if model.type == 'mmrazor.GeneralQuant':
        model.setdefault('input_shape', (3, 64, 64))
        if model.get('float_checkpoint') and not Path(model.float_checkpoint).is_file():
            model.float_checkpoint = None
    MODELS.build(model)


@functools.cache
def help_of(script: Path) -> str:
    """What a script answers to ``--help``."""
    text = captured(lambda: run_script(str(script), ['--help'], {}))
    assert text.startswith('usage:'), text
    return text


def check_options(script: str, arguments: list[str]) -> None:
    """Check that a script knows the options it is given."""
    options = {a.partition('=')[0] for a in arguments if a.startswith('-')}
    known = set(re.findall(r'(?<![\w-])--?[a-z][\w-]*', help_of(Path(script).resolve())))
    assert options <= known, f'{script} has no {", ".join(sorted(options - known))}'


def check_make_targets(targets: list[str]) -> None:
    """Check that the Makefile has targets."""
    known = re.findall(r'^([\w-]+):', (REPOSITORY / 'Makefile').read_text(encoding='utf-8'), re.MULTILINE)
    assert targets and set(targets) <= set(known), f'make has {known}, not {targets}'


def run_script(script: str, arguments: list[str], environment: dict[str, str]) -> None:
    """Run a script in this process, which spares the imports of a new one; its exit message is printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [script, *arguments])
        # As python does: scripts import what lies beside them.
        patch.syspath_prepend(str(Path(script).resolve().parent))
        for folder in reversed(environment.pop('PYTHONPATH', '').split(os.pathsep)):
            if folder:
                patch.syspath_prepend(str(Path(folder).resolve()))
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            runpy.run_path(script, run_name='__main__')
        except SystemExit as end:
            if end.code not in (None, 0):
                print(end.code)


@pytest.fixture
def clean_state(tmp_path, monkeypatch):
    """An empty folder with links to the repository's tools; undoes registrations and imports afterwards."""
    for name in LINKED:
        if (REPOSITORY / name).exists():
            (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    registries = (MODELS, TASK_UTILS, LOOPS)
    before = [dict(registry.module_dict) for registry in registries]
    modules = set(sys.modules)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ops.eager_mode():
        yield
    torch.set_num_threads(threads)
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], '__file__', None)):
            del sys.modules[name]
    for registry, kept in zip(registries, before):
        registry.module_dict.clear()
        registry.module_dict.update(kept)


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_examples_run(document, clean_state):
    blocks = blocks_of(document)
    assert blocks, 'a document without a checked example'
    run = DocumentRun(document)
    for block, following in zip(blocks, [*blocks[1:], None]):
        try:
            run.run(block, following)
        except Exception as error:
            error.add_note(f'in the block at line {block.line} of {document.relative_to(REPOSITORY)}')
            raise
    if run.skipped:
        pytest.skip(f'blocks not run: {", ".join(run.skipped)} missing')


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(document):
    text = FENCE.sub('', document.read_text(encoding='utf-8'))
    targets = [m[1] for m in LINK.finditer(text) if '://' not in m[1]]
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing


def test_all_documents_are_linked_from_the_readme():
    readme = (REPOSITORY / 'README.md').read_text(encoding='utf-8')
    unlinked = [d.name for d in DOCUMENTS[1:] if d.relative_to(REPOSITORY).as_posix() not in readme]
    assert not unlinked


@pytest.mark.parametrize('registry', [MODELS, LOOPS, TASK_UTILS], ids=lambda registry: registry.name)
def test_everything_that_a_config_can_name_is_documented(registry):
    ours = {name for name, kind in registry.module_dict.items() if kind.__module__.startswith('mmrazor_quant.')}
    text = ''.join(document.read_text(encoding='utf-8') for document in DOCUMENTS)
    assert ours, registry
    assert not {name for name in ours if name not in text}
