"""Capture one model of every family that an OpenMMLab package ships, and report how much of it is quantizable.

python tools/zoo_coverage.py --package mmcls --out zoo.json                     all families
python tools/zoo_coverage.py --package mmcls --families resnet,vgg --out zoo.json
python tools/zoo_coverage.py --package mmcls --out zoo.json --resume            go on with a run that was killed

A family is a folder of the configs inside the installed package. Of its configs the one whose model has the fewest
parameters is taken (then the smallest image, then the name), built with random weights. Configs of re-parameterized
networks (``deploy=True``, or in a folder of their own below the family's) are passed over where the family has
another: they are plain convolutions, nobody trains them. Each family runs in a process of its own, whose output is
kept in OUT.logs/FAMILY.log.

OUT is a JSON list, one object a family: family, config, ran_float, captured (no layer is outside the islands),
islands, layers_total, layers_inside, layers_alone, outside, custom_ops, training_only, equal_eval, equal_train,
equal_resized, seconds, reason. Layers of modules that run in training only are not counted: they are not deployed.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

KEYS = (
    'family', 'config', 'ran_float', 'captured', 'islands', 'layers_total', 'layers_inside', 'layers_alone', 'outside',
    'custom_ops', 'training_only', 'equal_eval', 'equal_train', 'equal_resized', 'seconds', 'reason',
)  # fmt: skip
RESIZE_BY = 32


@dataclass(frozen=True)
class Package:
    """What differs between the packages; everything else here holds for any of them.

    Args:
        size_fields: fields of a transform that set the image size, as an int or a pair.
    """

    size_fields: tuple[str, ...]


PACKAGES = {
    'mmcls': Package(size_fields=('crop_size', 'scale')),
    # Detectors run on images of any size; those of their configs take too long.
    'mmdet': Package(size_fields=()),
}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--package', required=True, choices=sorted(PACKAGES), help='installed package')
    parser.add_argument('--families', help='comma-separated folders of the configs; default: all')
    parser.add_argument('--out', required=True, type=Path, metavar='FILE.json', help='written after each family')
    parser.add_argument('--resume', action='store_true', help='keep the families that OUT already has')
    parser.add_argument('--timeout', type=float, default=900, metavar='SECONDS', help='for one family; default 900')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Runs all families, or one of them in a worker process; returns the exit status."""
    args = parse_args()
    if args.worker:
        run_worker(args.package, args.worker, args.out)
        return 0
    known = list_families(args.package)
    families = list(dict.fromkeys(args.families.split(','))) if args.families else known
    unknown = sorted(set(families) - set(known))
    if unknown:
        print(f'--families: {args.package} ships no {", ".join(unknown)}; it has {", ".join(known)}', file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, interrupt)
    records = read_records(args.out) if args.resume else []
    try:
        run_families(args, families, records)
    except KeyboardInterrupt:
        print(f'\ninterrupted; --resume goes on with {args.out}', file=sys.stderr)
        return 130
    print(summary(args.package, [r for r in records if r['family'] in families]))
    return 0


def interrupt(signum: int, frame: Any) -> None:
    """Treats a request to end like Ctrl-C, so that the worker is ended as well."""
    raise KeyboardInterrupt


# -- the run over all families ------------------------------------------------------------------------------------


def run_families(args: argparse.Namespace, families: list[str], records: list[dict[str, Any]]) -> None:
    """Runs one worker after the other; ``records`` and the file grow by one object each."""
    done = {record['family'] for record in records}
    waiting = [family for family in families if family not in done]
    if len(waiting) < len(families):
        print(f'resuming: {len(families) - len(waiting)} families are in {args.out} already')
    start = time.perf_counter()
    for index, family in enumerate(waiting):
        record = run_in_process(args, family)
        records.append(record)
        write_json(args.out, records)
        per_family = (time.perf_counter() - start) / (index + 1)
        eta = timedelta(seconds=round(per_family * (len(waiting) - index - 1)))
        print(f'[{index + 1}/{len(waiting)}] eta {eta}  {one_line(record)}', flush=True)


def run_in_process(args: argparse.Namespace, family: str) -> dict[str, Any]:
    """Runs one family in a worker; a worker that dies leaves what it had written, with the reason added."""
    log = args.out.with_name(f'{args.out.name}.logs') / f'{family}.log'
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / 'record.json'
        command = [sys.executable, str(Path(__file__).resolve())]
        command += ['--package', args.package, '--worker', family, '--out', str(result)]
        start = time.perf_counter()
        with log.open('w', encoding='utf-8') as output:
            ended = run_until(command, output, args.timeout)
        record = json.loads(result.read_text(encoding='utf-8')) if result.exists() else new_record(family)
    if ended:
        record['reason'] = f'{ended} {record["reason"]}'.strip()
        record['seconds'] = round(time.perf_counter() - start, 1)
    return record


def run_until(command: list[str], output: Any, timeout: float) -> str:
    """Runs a command; returns '' or, where it did not end well, how it ended."""
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return f'timed out after {timeout:g} s'
    finally:
        process.kill()
        process.wait()
    return '' if status == 0 else f'the worker ended with status {status}'


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads the objects of an earlier run; none where there is no file."""
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else []


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is whole at any moment."""
    partial = path.with_name(f'.{path.name}.partial')
    partial.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    os.replace(partial, path)


def one_line(record: dict[str, Any]) -> str:
    """Describes one family."""
    layers = f'{record["layers_inside"]}/{record["layers_total"]} layers in {record["islands"]} islands'
    same = ' '.join(f'{key[6:]}={shown(record[key])}' for key in ('equal_eval', 'equal_train', 'equal_resized'))
    alone = f', {record["layers_alone"]} alone' if record['layers_alone'] else ''
    reason = f'  {record["reason"][:160]}' if record['reason'] else ''
    return f'{record["family"]:<22} {layers}{alone}; equal: {same}; {record["seconds"]:.0f} s{reason}'


def shown(equal: bool | None) -> str:
    """Words for the three outcomes of a comparison."""
    return {True: 'yes', False: 'NO', None: '-'}[equal]


def summary(package: str, records: list[dict[str, Any]]) -> str:
    """Returns the line that a run ends with."""
    total = {key: sum(r[key] or 0 for r in records) for key in ('islands', 'layers_total', 'layers_inside')}
    equal = [
        f'{key[6:]} {sum(r[key] is True for r in records)}/{sum(r[key] is not None for r in records)}'
        for key in ('equal_eval', 'equal_train', 'equal_resized')
    ]
    not_captured = [r['family'] for r in records if not r['captured']]
    return (
        f'{package}: {len(records)} families, {sum(r["ran_float"] for r in records)} ran, '
        f'{len(records) - len(not_captured)} captured with {total["layers_inside"]}/{total["layers_total"]} layers in '
        f'{total["islands"]} islands, {sum(r["layers_alone"] or 0 for r in records)} layers alone; '
        f'bit-equal: {", ".join(equal)}; not captured: {", ".join(not_captured) or "none"}'
    )


# -- one family ---------------------------------------------------------------------------------------------------


def new_record(family: str) -> dict[str, Any]:
    """Returns the object of a family of which nothing is known yet."""
    record = dict.fromkeys(KEYS)
    record.update(family=family, ran_float=False, captured=False, islands=0, layers_total=0, layers_inside=0)
    record.update(layers_alone=0, outside=[], custom_ops=[], training_only=[], seconds=0.0, reason='')
    return record


def run_worker(package: str, family: str, out: Path) -> None:
    """Measures one family, writing the object after each stage: what is there when time runs out counts."""
    from mmengine.logging import MMLogger

    # Initialising weights logs every parameter.
    MMLogger.get_instance('zoo_coverage', logger_name='mmengine', log_level='WARNING')
    record, start = new_record(family), time.perf_counter()
    stages = measure(package, family, record)
    try:
        for stage in stages:
            print(f'-- {stage}', flush=True)
            write_json(out, {**record, 'reason': f'while {stage}'})
    except Exception as error:  # anything that a model of the zoo raises is a result of this tool
        traceback.print_exc()
        add_reason(record, f'{type(error).__name__}: {error}')
    record['seconds'] = round(time.perf_counter() - start, 1)
    write_json(out, record)


def measure(package: str, family: str, record: dict[str, Any]) -> Iterator[str]:
    """Fills in the object of a family; yields the name of each stage before it begins."""
    from mmrazor_quant.analysis import coverage

    yield 'choosing the smallest config'
    name, config = smallest_config(package, family)
    record['config'] = name
    yield f'building {name}'
    model = build_model(config)
    coverage.randomize(model)
    eager = coverage.eager_copy(model)
    yield 'capturing'
    findings, shape = coverage.capture(model, input_shape(PACKAGES[package], config))
    record['ran_float'] = True
    record.update(coverage.coverage_fields(model, findings))
    print_findings(model, findings)
    resized = (*shape[:2], *(n + RESIZE_BY for n in shape[2:]))
    for key, training, at in (
        ('equal_eval', False, shape),
        ('equal_train', True, shape),
        ('equal_resized', False, resized),
    ):
        yield f'comparing ({key[6:]})'
        comparison = coverage.compare(eager, model, at, training)
        record[key] = comparison.equal
        if key == 'equal_resized' and comparison.equal is None:
            add_reason(record, f'takes no images of {resized}: {comparison.notes[0]}')
            continue
        for note in comparison.notes:
            add_reason(record, note)


def add_reason(record: dict[str, Any], reason: str) -> None:
    """Adds to why something could not run, once."""
    reason = ' '.join(reason.split())[:600]
    if reason not in record['reason']:
        record['reason'] = '; '.join(filter(None, [record['reason'], reason]))


def print_findings(model: Any, findings: Any) -> None:
    """Prints, for the log, the islands and why each module that was tried is not one."""
    from mmrazor_quant.tracing.report import CaptureReport

    report = CaptureReport.of(model, findings)
    print(report.table())
    for path in report.layers_alone:
        print(f'alone: {path}')
    for path, error in findings.failures.items():
        print(f'not an island: {path or "(model)"}: {type(error).__name__}: {error}')


# -- configs of a package -----------------------------------------------------------------------------------------


def configs_folder(package: str) -> Path:
    """Returns where an installed package keeps its configs."""
    return Path(importlib.import_module(package).__file__).parent / '.mim' / 'configs'


def list_families(package: str) -> list[str]:
    """Returns the folders of a package's configs; those with an underscore are parts to inherit from."""
    folder = configs_folder(package)
    if not folder.is_dir():
        raise SystemExit(f'--package: the installed {package} ships no configs in {folder}')
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(('_', '.')))


def smallest_config(package: str, family: str) -> tuple[str, Any]:
    """Returns name and content of the config whose model has the fewest parameters.

    Raises:
        RuntimeError: there is no config whose model can be built; with the reasons.
    """
    found, errors = [], []
    root = configs_folder(package)
    for path in sorted((root / family).rglob('*.py')):
        if path.name.startswith('_'):
            continue
        name = str(path.relative_to(root))
        try:
            config = load_config(package, path)
            is_variant = is_deployed(config.model) or path.parent != root / family
            found.append((is_variant, count_parameters(config), pixels(package, config), name, config))
        except Exception as error:  # one broken config of a family does not make the others useless
            errors.append(f'{name}: {type(error).__name__}: {error}')
    if not found:
        raise RuntimeError('no config can be built: ' + '; '.join(errors))
    for error in errors:
        print(f'passed over: {error}')
    _, parameters, _, name, config = min(found, key=lambda candidate: candidate[:4])
    print(f'{name}: {parameters} parameters, the fewest of {len(found)} configs')
    return name, config


def load_config(package: str, path: Path) -> Any:
    """Reads a config and registers the modules of its package."""
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    from mmrazor_quant.engine.launch import register_codebase

    # Some of mmcls import a module, which makes mmengine take them for the other kind of config.
    config = Config.fromfile(str(path), lazy_import=False)
    scope = config.get('default_scope') or package
    register_codebase(scope)
    init_default_scope(scope)
    return config


def build_model(config: Any) -> Any:
    """Builds the model of a config as mmengine's runner does, on the CPU, with random weights."""
    from mmengine.registry import MODELS

    # A copy: constructors of mmdet change what they are given.
    model = copy.deepcopy(config.model)
    if config.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', config.data_preprocessor)
    return MODELS.build(model)


def count_parameters(config: Any) -> int:
    """Counts parameters without allocating most of them: layers get their weights from ``torch.empty``."""
    import torch
    from torch.overrides import TorchFunctionMode

    class EmptyIsMeta(TorchFunctionMode):
        def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if func is torch.empty and kwargs.get('device') is None:
                kwargs['device'] = 'meta'
            return func(*args, **kwargs)

    try:
        with EmptyIsMeta():
            model = build_model(config)
    except (NotImplementedError, RuntimeError):  # a constructor that computes with its weights
        model = build_model(config)
    return sum(p.numel() for p in model.parameters())


def is_deployed(value: Any) -> bool:
    """Tells whether a config of a model says ``deploy=True`` anywhere."""
    if isinstance(value, Mapping):
        return value.get('deploy') is True or any(map(is_deployed, value.values()))
    return isinstance(value, (list, tuple)) and any(map(is_deployed, value))


def pixels(package: str, config: Any) -> int:
    """Returns the pixels of an image, 0 where the config does not tell."""
    size = image_size(PACKAGES[package], config)
    return size[0] * size[1] if size else 0


def input_shape(package: Package, config: Any) -> tuple[int, int, int] | None:
    """Returns the shape (channels, height, width) of an image, None where the config does not tell."""
    size = image_size(package, config)
    return None if size is None else (channels(config), *size)


def image_size(package: Package, config: Any) -> tuple[int, int] | None:
    """Returns the (height, width) that the test images, or else the training images, end up with."""
    for loader in ('test_dataloader', 'train_dataloader'):
        for transform in reversed(pipeline(config.get(loader))):
            for name in package.size_fields:
                size = transform.get(name)
                if isinstance(size, int):
                    return size, size
                if isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(n, int) for n in size):
                    return size[1], size[0]
    return None


def pipeline(loader: Any) -> list[Any]:
    """Returns the transforms of a dataloader's config, those of the dataset inside a wrapper too."""
    dataset = (loader or {}).get('dataset') or {}
    while not dataset.get('pipeline') and isinstance(dataset.get('dataset'), Mapping):
        dataset = dataset['dataset']
    return list(dataset.get('pipeline') or [])


def channels(config: Any) -> int:
    """Returns how many channels an image has: the first layer's, else the preprocessor's, else 3."""
    declared = config.model.get('backbone', {}).get('in_channels')
    if isinstance(declared, int):
        return declared
    for preprocessor in (config.model.get('data_preprocessor'), config.get('data_preprocessor')):
        if preprocessor and preprocessor.get('mean') is not None:
            return len(preprocessor['mean'])
    return 3


if __name__ == '__main__':
    sys.exit(main())
