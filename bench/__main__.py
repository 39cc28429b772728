"""Run benchmarks and show their tables: ``python -m bench [NAME ...]``; see ``--help``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path

import transformers

from bench.measure import Row
from bench.report import machine, tables, verdict, write

NAMES = ("splice", "pixels", "decode", "session", "logmel", "aggregators", "batching", "eval")


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; 1 with ``--strict`` when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: figures mean nothing")
    parser.add_argument("--write", type=Path, metavar="FILE", help="renew the tables of a page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows")
    parser.add_argument("--strict", action="store_true", help="fail when a target is missed")
    options = parser.parse_args(arguments)
    names = options.names or list(NAMES)
    for name in names:
        if name not in NAMES:
            parser.error(f"there is no benchmark {name!r}; there are: {', '.join(NAMES)}")
    transformers.logging.set_verbosity_error()
    found: dict[str, list[Row]] = {}
    for name in names:
        module = importlib.import_module(f"bench.{name}")
        started = time.perf_counter()
        found[name] = module.run(options.quick)
        table = tables(found[name], module.RATIO)
        took = time.perf_counter() - started
        print(f"## {module.TITLE}\n\n{table}\n({took:.0f} s)\n", flush=True)
        if options.write is not None:
            write(options.write, name, f"{machine()}\n\n{table}")
    rows = [row for own in found.values() for row in own]
    print(machine(), verdict(rows), sep="\n")
    if options.json is not None:
        data = {k: [dataclasses.asdict(row) for row in own] for k, own in found.items()}
        options.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return int(options.strict and any(row.met is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
