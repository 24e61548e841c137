"""What ``tools/train.py`` and ``tools/test.py`` share: arguments, config, errors, the end of processes."""

from __future__ import annotations

import argparse
import atexit
import importlib
import logging
import os
import os.path as osp
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger

from mmrazor_quant.engine.checkpoint import check_checkpoint

DEBUG_VARIABLE = 'MMRAZOR_DEBUG'
"""Environment variable that has all errors shown with their traceback."""

_DELIBERATE = (AssertionError, ImportError, KeyError, RuntimeError, ValueError)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that both tools have, as in other OpenMMLab projects.

    Args:
        parser: Parser of the tool.
    """
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints; default: work_dirs/<name of the config>')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override fields of the config: key=value, also nested ones (a.b.c=1) and lists (key="[a,b]")',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    # torch.distributed.launch passes one of these; torchrun sets the environment variable instead.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def load_config(args: argparse.Namespace) -> Config:
    """Read the config of a tool and merge its common arguments into it.

    Args:
        args: Parsed arguments.

    Returns:
        The config, with ``work_dir`` and ``launcher`` set and its codebase registered.

    Raises:
        FileNotFoundError: If there is no such config.
        ValueError: If its ``default_scope`` is no installed codebase.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if not osp.isfile(args.config):
        raise FileNotFoundError(f'config: there is no file {args.config}')
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs', Path(args.config).stem)
    if 'model' not in cfg:
        raise ValueError(f'config: {args.config} has no field model: is it one to inherit from only?')
    register_codebase(cfg.get('default_scope'))
    if cfg.get('default_scope') == 'mmcls':
        set_mmcls_dataloader_defaults(cfg)
    if cfg.launcher != 'none' and not torch.cuda.is_available():
        set_cpu_distribution(cfg)
    return cfg


def set_cpu_distribution(cfg: Config) -> None:
    """Let several processes work on CPUs, for which mmengine's defaults do not serve.

    Processes that torchrun started join their group here, since mmengine would give each a GPU first.

    Args:
        cfg: Config, changed in place: the backend NCCL becomes Gloo, and the wrapper of the model names no device.
    """
    env_cfg = cfg.setdefault('env_cfg', {})
    dist_cfg = env_cfg.setdefault('dist_cfg', {})
    if dist_cfg.get('backend', 'nccl') == 'nccl':
        dist_cfg['backend'] = 'gloo'
    if cfg.get('model_wrapper_cfg') is None:
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
    if cfg.launcher == 'pytorch' and not dist.is_initialized():
        dist.init_process_group(dist_cfg['backend'])


def register_codebase(scope: str | None) -> None:
    """Register the modules of the codebase that a config belongs to.

    Args:
        scope: ``default_scope`` of the config, such as ``'mmcls'`` or ``'mmdet'``.

    Raises:
        ValueError: If there is no such package here.
    """
    if scope in (None, 'mmengine', 'mmrazor'):
        return
    try:
        utils = importlib.import_module(f'{scope}.utils')
    except ModuleNotFoundError as error:
        raise ValueError(f'default_scope={scope!r}: cannot import {scope} ({error}); install it') from error
    if hasattr(utils, 'register_all_modules'):
        utils.register_all_modules(init_default_scope=False)


def set_mmcls_dataloader_defaults(cfg: Config) -> None:
    """Fill in what the configs of mmcls leave to its tools: how samples become a batch.

    Args:
        cfg: Config, changed in place.
    """
    for field in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(field)
        if isinstance(loader, dict):
            loader.setdefault('collate_fn', {'type': 'default_collate'})
            # Pinning without an accelerator does nothing but warn.
            loader.setdefault('pin_memory', torch.cuda.is_available())


def check_checkpoint_fields(cfg: Config) -> None:
    """Fail early on checkpoints named in a config that are missing or damaged.

    Args:
        cfg: Config of a run.
    """
    check_checkpoint(cfg.get('load_from'), 'load_from')
    check_checkpoint(cfg.model.get('float_checkpoint'), 'model.float_checkpoint')


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool; mistakes in its input end in one line, bugs in a traceback, both with an exit code.

    What counts as a mistake is an exception that was raised on purpose (by a ``raise`` or ``assert``), or an error
    of the operating system. The traceback is added to the log file of the run, where there is one already.

    Args:
        main: The tool.
    """
    # mmengine imports it; the user can do nothing about that.
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated as an API')
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('interrupted')
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE) or not _is_deliberate(error):
            raise
        log_file = _append_to_log(error)
        where = f'traceback in {log_file}' if log_file else f'{DEBUG_VARIABLE}=1 shows the traceback'
        sys.exit(f'error: {_message(error)}\n({where})')
    if dist.is_available() and dist.is_initialized():
        leave_process_group()


def leave_process_group() -> None:
    """Leave the process group together with the others; with Gloo, the process ends here, with exit code 0.

    All are waited for: a process that leaves first takes the connections of the others with it. The threads of Gloo
    outlive the group, and one that releases a tensor while the interpreter is torn down aborts the process. It ends
    before that, after the functions registered for its exit.
    """
    backend = dist.get_backend()
    dist.barrier()
    dist.destroy_process_group()
    if backend == 'gloo':
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _append_to_log(error: Exception) -> str | None:
    """Add the traceback of an error to the log file of the current run; returns its path, None if there is none."""
    for handler in MMLogger.get_current_instance().handlers:
        if isinstance(handler, logging.FileHandler):
            with open(handler.baseFilename, 'a', encoding='utf-8') as file:
                traceback.print_exception(type(error), error, error.__traceback__, file=file)
            return handler.baseFilename
    return None


def _message(error: Exception) -> str:
    """Get the text of an error; ``str`` of a KeyError would quote it."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _is_deliberate(error: Exception) -> bool:
    """Tell a mistake in the input, reported on purpose, from a bug."""
    if isinstance(error, OSError):
        return True
    if not isinstance(error, _DELIBERATE) and type(error) is not TypeError:
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    if type(error) is TypeError and not _is_ours(last.filename):
        return False
    return (last.line or '').startswith(('raise', 'assert'))


def _is_ours(filename: str) -> bool:
    """Tell whether a source file is part of this package or its tools."""
    root = Path(__file__).resolve().parents[1]
    return root in Path(filename).resolve().parents or (root.parent / 'tools') in Path(filename).resolve().parents
