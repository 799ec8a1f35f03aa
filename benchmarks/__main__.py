"""``make bench``: every benchmark, then the charts and the README's tables from their results.

With ``--quick`` each measures little and writes nothing, and the charts and the README stay.
"""

import argparse
import sys

from benchmarks import (
    bench_collate,
    bench_conv_bias_relu,
    bench_loader,
    bench_normalize,
    bench_pixels,
    plot,
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few minutes; writes nothing")
    arguments = ["--quick"] if parser.parse_args().quick else []
    status = max(
        benchmark.main(arguments)
        for benchmark in (
            bench_normalize,
            bench_collate,
            bench_loader,
            bench_pixels,
            bench_conv_bias_relu,
        )
    )
    if not arguments:
        plot.main([])
    sys.exit(status)
